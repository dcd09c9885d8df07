"""Misuse that raises an error before anything is written."""

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import CheckpointError


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "run") as opened:
        yield opened


@pytest.mark.parametrize("every", [0, -5, 2.5, True, "5"])
def test_every_must_be_a_positive_integer(store, every):
    with pytest.raises(ValueError, match=f"every={every!r} must be an integer >= 1"):
        store.maybe_save(x={"w": torch.ones(1)}, step=5, every=every)
    assert store.list() == ()


def test_a_model_without_data_is_not_saved(store):
    with torch.device("meta"):
        model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"model\.weight is on the meta device.*no data.*to_empty"):
        store.save(model=model, step=1)
    with pytest.raises(ValueError, match=r"shadow\.0 is on the meta device"):
        store.save(shadow=[model.bias], step=1)
    assert store.list() == ()


@pytest.mark.parametrize(("mode", "kind"), [(None, "smallest"), ("max", "largest")])
def test_the_error_for_best_without_a_metric_says_what_best_means(tmp_path, mode, kind):
    with CheckpointStore(tmp_path, mode=mode) as store:
        store.save(m={"w": torch.ones(1)}, step=3)
        text = rf'"best" is the clean one with the {kind} metric \(mode="{mode or "min"}"\)'
        with pytest.raises(CheckpointError, match=rf"no checkpoint 'best'.*steps are 3.*{text}"):
            store.load("best")


def test_a_step_that_is_too_large_for_a_file_name_is_not_saved(store):
    store.save(w=torch.ones(1), step=10**18 - 1)
    with pytest.raises(ValueError, match=r"step=1000000000000000000 is too large"):
        store.save(w=torch.ones(1), step=10**18)
    assert [entry.step for entry in store.list()] == [10**18 - 1]
