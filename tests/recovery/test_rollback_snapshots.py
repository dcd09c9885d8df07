"""The contents of snapshots, and snapshots that are never restored."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from fastguard import (
    TrainingDivergedError,
)
from fastguard.recovery.snapshot import Snapshot
from guardtest.rollback_run import Run, same


def test_a_poisoned_snapshot_is_never_restored(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(every=2, keep=2)
    for i in range(4):
        run.batch(i)
    with torch.no_grad():
        run.model[0].weight[1, 2] = math.nan  # the guard does not see this change
    run.rollback.snapshot(position=3)
    # The last snapshot that is known to be finite.
    assert run.rollback.trigger("suspicion").step == 2
    said = [message for message in caplog.messages if "is not finite" in message]
    assert len(said) == 1 and "step 4" in said[0] and "model.0.weight" in said[0]
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_without_a_finite_snapshot_the_error_names_the_bad_tensors() -> None:
    run = Run(every=100, keep=1)
    with torch.no_grad():
        run.model[0].weight[1, 2] = math.inf
    run.rollback.snapshot()
    with pytest.raises(TrainingDivergedError, match=r"no snapshot is finite.*model\.0\.weight"):
        run.rollback.trigger()


def test_random_states_are_restored_too() -> None:
    run = Run()
    run.rollback.snapshot()
    drawn = torch.rand(3), np.random.rand(), random.random()
    run.rollback.trigger()
    again = torch.rand(3), np.random.rand(), random.random()
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]


def test_a_second_snapshot_reuses_the_memory_of_the_first() -> None:
    model = torch.nn.Linear(64, 64)
    slot = Snapshot()
    slot.take({"model": model}, 1, None)
    first = slot._states["model"]["weight"].data_ptr()
    with torch.no_grad():
        model.weight += 1
    slot.take({"model": model}, 2, None)
    assert slot._states["model"]["weight"].data_ptr() == first
    assert torch.equal(slot._states["model"]["weight"], model.weight)


def test_further_training_does_not_change_a_snapshot() -> None:
    run = Run(every=3)
    for i in range(3):
        run.batch(i)
    at_three = run.state()
    for i in range(3, 5):
        run.batch(i)
    run.rollback.trigger()
    assert same(run.state(), at_three)
    for i in range(3, 5):  # the loaded values are copies, which a second rollback needs unchanged
        run.batch(i)
    run.rollback.trigger()
    assert same(run.state(), at_three)
