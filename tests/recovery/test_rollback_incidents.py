"""`Rollback` in runs that apply incidents, whose NaN is cleaned, recorded or propagated."""

from __future__ import annotations

import math

import pytest
import torch

from fastguard import GuardedOptimizer, Rollback, StepRecord, Threshold
from fastguard.recovery.incident_log import IncidentLog

SPIKES = {"loss": Threshold(max=1.0, action="record")}


class Loop:
    def __init__(self, guard: dict, **rollback) -> None:
        self.model = torch.nn.Linear(4, 4)
        self.opt = GuardedOptimizer(torch.optim.SGD(self.model.parameters(), lr=0.01), **guard)
        self.rollback = Rollback(self.opt, {"model": self.model}, **rollback)

    def steps(self, n: int, grad: float = 1.0, loss: float = 0.5):
        for _ in range(n):
            for p in self.model.parameters():
                p.grad = torch.ones_like(p)
            self.model.weight.grad[0, 0] = grad
            self.opt.step(loss=loss)
            rewind = self.rollback.step(self.opt.steps_taken)
        return rewind


@pytest.mark.parametrize(
    ("guard", "every_step"),
    [
        ({"nonfinite": "zero"}, {"grad": math.nan}),
        ({"nonfinite": "zero", "max_norm": 0.1}, {"grad": math.inf}),
        ({"spike": SPIKES}, {"loss": 2.0}),
        ({"spike": {"grad_norm": Threshold(max=1.0, action="clip")}}, {}),
        ({"nonfinite": "zero", "spike": SPIKES}, {"grad": -math.inf, "loss": 2.0}),
    ],
    ids=["zeroed", "zeroed-clipped", "recorded", "spike-clipped", "zeroed-recorded"],
)
def test_incidents_applied_at_every_step_do_not_prevent_snapshots(guard, every_step) -> None:
    loop = Loop(guard, every=5, keep=2)
    loop.steps(40, **every_step)
    assert loop.rollback.snapshots == [30, 40]
    assert len(loop.rollback._incidents._bad) == 10
    loop.steps(3, **every_step)
    rewind = loop.rollback.trigger()
    assert (rewind.step, rewind.skip) == (40, (41, 42, 43))


def test_a_snapshot_waits_for_a_step_without_an_incident() -> None:
    loop = Loop({"nonfinite": "zero"}, every=4)
    loop.steps(3)
    loop.steps(3, math.nan)
    assert loop.rollback.snapshots == [0]
    loop.steps(1)
    assert loop.rollback.snapshots == [0, 7]


def test_a_spike_that_can_trigger_a_rollback_prevents_a_snapshot() -> None:
    loop = Loop({"spike": SPIKES}, every=2, after_spikes=9)
    loop.steps(8, loss=2.0)
    assert loop.rollback.snapshots == [0]
    loop.steps(2)
    assert loop.rollback.snapshots == [0, 10]


def test_propagated_nan_prevents_snapshots_and_the_reason_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = Loop({"nonfinite": "propagate"}, every=3)
    loop.steps(4)
    loop.steps(100, math.nan)
    assert loop.rollback.snapshots == [0, 3]
    said = [m for m in caplog.messages if "no snapshot" in m]
    assert len(said) == 1
    assert (
        "30 steps were bad since the last snapshot" in said[0]
        and "every=3" in said[0]
        and "nonfinite_grad" in said[0]
    )
    assert loop.rollback.trigger().step == 3


def test_skips_without_a_rollback_are_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop({}, every=1, after_skips=None)
    loop.steps(25, math.nan)
    assert sum("no snapshot" in message for message in caplog.messages) == 1
    assert loop.rollback.snapshots == [0]


def test_the_list_of_bad_steps_is_bounded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastguard.recovery.incident_log.POSITIONS", 5)
    loop = Loop({}, every=1, after_skips=None)
    loop.steps(50, math.nan)
    assert loop.rollback.trigger().skip == (46, 47, 48, 49, 50)
    assert sum("Rewind.skip will lack the first of" in message for message in caplog.messages) == 1


def test_a_search_for_a_loss_scale_is_not_a_bad_step() -> None:
    stretch = IncidentLog(every=2, after_skips=2, after_spikes=None)
    overflow = StepRecord(1, 1.0, 1.0, "skipped", "loss_scale", posinf=3)
    bad = StepRecord(1, 1.0, 1.0, "skipped", "nonfinite_grad", nan=3)
    for _ in range(20):
        assert stretch.learn(overflow, "overflow") is None
    assert not stretch.is_due  # it has not changed the weights either
    assert stretch.learn(bad, "bad") is None
    assert stretch.learn(overflow, "overflow") is None
    assert stretch.learn(bad, "bad") == "2 steps in a row were skipped"
    assert stretch.positions_since(stretch.now(0)) == ("bad", "bad")
