"""Objects and random states in checkpoints, and errors for those that cannot be saved."""

import collections
import json
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fastguard import CheckpointStore, GuardedOptimizer
from fastguard.checkpoints import CheckpointError, DamagedFile
from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints.random_state import random_state, set_random_state

NAN = float("nan")


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "run", keep=9) as opened:
        yield opened


def save(store, step, value=1.0, **more):
    return store.save(weights={"w": torch.full((3,), float(value))}, step=step, **more)


def test_the_cached_gaussian_number_is_restored():
    random.gauss(0.0, 1.0), np.random.randn()  # both draw two numbers and keep one
    state = random_state()
    drawn = random.gauss(0.0, 1.0), np.random.randn(), torch.randn(2).tolist()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    set_random_state(state)
    assert (random.gauss(0.0, 1.0), np.random.randn(), torch.randn(2).tolist()) == drawn


def test_random_states_of_other_devices_change_nothing():
    state = {**random_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 64}
    torch.rand(1)
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=r"from 64 CUDA devices.*rng=False"):
        set_random_state(state)
    assert torch.equal(torch.get_rng_state(), before)


class Settings(dict):
    pass


class Row(list):
    pass


class Pair(NamedTuple):
    a: int
    b: int


def test_types_that_cannot_be_loaded_are_converted_or_named(store):
    kinds = {"settings": Settings(a=1), "ordered": collections.OrderedDict(b=2), "set": {3}}
    store.save(data=kinds, step=0)
    found = store.load().state["data"]
    assert found == kinds and type(found["settings"]) is dict
    for value in (Row([1]), Pair(1, 2)):
        with pytest.raises(TypeError, match=rf"data\.x is a {type(value).__name__}, which"):
            store.save(data={"x": value}, step=1)


def test_a_generator_among_the_objects_is_restored(store):
    generator = torch.Generator().manual_seed(3)
    store.save(order=generator, step=0)
    drawn = torch.rand(2, generator=generator)
    store.load("last", order=generator)
    assert torch.equal(torch.rand(2, generator=generator), drawn)


def test_load_with_rng_false_keeps_the_random_states(store):
    model = torch.nn.Linear(1, 1)
    store.save(model=model, step=0)
    torch.rand(1)
    before = torch.get_rng_state()
    store.load("last", model=model, rng=False)
    assert torch.equal(torch.get_rng_state(), before)
    store.load("last", model=model)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_latest_notes_are_kept_until_the_next_clean_checkpoint(store):
    told = [f"incident {i}" for i in range(10)]
    assert save(store, 0, NAN, incidents=told).notes == tuple(told[2:])
    entry = save(store, 1, NAN)
    assert (entry.incidents, entry.notes) == (10, tuple(told[2:]))
    entry = save(store, 2, incidents=["the last"])
    assert (entry.incidents, entry.notes) == (11, (*told[3:], "the last"))
    entry = save(store, 3, incidents=["another"])
    assert (entry.incidents, entry.notes) == (1, ("another",))


def test_a_new_guard_counts_skips_from_zero(store):
    def guard(n_skips):
        opt = GuardedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
        for _ in range(n_skips):
            opt.step(loss=NAN)
        return opt

    assert store.save(optimizer=guard(3), step=3).incidents == 3
    assert store.save(optimizer=guard(1), step=1).incidents == 1
    assert store.save(a=guard(1), b=guard(4), step=9).skipped_steps == 5


def test_the_manifest_is_json_that_every_parser_reads(store):
    save(store, 0, metric=NAN)
    with pytest.raises(TypeError, match="tag=nan cannot be stored"):
        save(store, 1, tag=NAN)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (store.directory / "manifest.json").read_text()
    assert json.loads(text, parse_constant=refuse)["checkpoints"][0]["metric"] == "nan"


def test_the_next_writer_knows_the_checkpoints_set_aside(store):
    save(store, 0)
    aside = save(store, 1)
    assert store.rollback(to=0).step == 0
    store.close()
    with CheckpointStore(store.directory) as later:
        assert later.replaced() == (aside,)
        assert save(later, 1).serial == aside.serial + 1  # no name is used twice
        assert later.load(1).step == 1


def test_the_newer_of_two_checkpoints_of_a_step_is_loaded(store):
    save(store, 1, 1.0)
    save(store, 1, 2.0)
    assert store.load(1).state["weights"]["w"].tolist() == [2.0] * 3
    assert [check.entry.serial for check in store.verify(1)] == [2]
    with pytest.raises(ValueError, match="True is not a checkpoint"):
        store.load(True)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_is_the_newest_of_equals_and_never_nan(tmp_path, mode):
    with CheckpointStore(tmp_path, mode=mode, keep=9) as store:
        save(store, 0, metric=NAN)
        assert store.best() is None
        for step in (1, 2):
            save(store, step, metric=0.5)
        assert store.best().step == 2


def test_keep_clean_checkpoints_are_kept(tmp_path):
    with CheckpointStore(tmp_path, keep=1, keep_clean=2) as store:
        for step, value in enumerate((1.0, 1.0, 1.0, NAN, NAN)):
            save(store, step, value)
        assert [entry.step for entry in store.list()] == [1, 2, 4]


def test_the_text_of_an_entry_is_one_line(store):
    entry = save(store, 3, epoch=1, metric=0.25)
    assert str(entry) == f"{entry.file} (step 3, epoch 1, metric 0.25, clean)"
    assert str(save(store, 4, NAN)).endswith("(step 4, not finite: weights.w (3 NaN))")


def test_data_that_differs_when_read_back_is_not_a_checkpoint(tmp_path, monkeypatch, caplog):
    """A faulty disk controller returns other data than was written."""
    honest = files.Sink.write

    def lying(sink, data):
        raw = bytes(memoryview(data).cast("B"))
        return honest(sink, raw.replace(b"\x00\x00\x80\x3f", b"\x00\x00\x80\x3e", 1))

    for on_error in ("log", "raise"):
        with CheckpointStore(tmp_path / on_error, on_error=on_error) as store:
            save(store, 0, 2.0)
            with monkeypatch.context() as patch:
                patch.setattr(files.Sink, "write", lying)
                if on_error == "log":
                    assert save(store, 1) is None
                    assert "step 1 was NOT saved" in caplog.text
                else:
                    with pytest.raises(DamagedFile, match="changed after the file was written"):
                        save(store, 1)
            assert [entry.step for entry in store.list()] == [0]
            assert len(list(store.directory.glob("*.pt"))) == 1


def test_only_nonfinite_checkpoints_are_logged(store, caplog):
    save(store, 0)
    assert not caplog.messages
    save(store, 1, NAN)
    assert "the checkpoint at step 1 is not finite: weights.w (3 NaN)" in caplog.text
