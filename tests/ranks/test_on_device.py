"""The code for GPUs, which does not read values, gives the same results as that for CPUs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from fastguard import SpikeRule, Threshold
from fastguard.ranks.loss_names import OTHERS, OWN, PLACES, LossNames
from fastguard.records.device_row import Outcome
from fastguard.records.recorder import Recorder
from fastguard.records.unfinished import Settled
from fastguard.stages import reference
from fastguard.stages.contract import GuardState, Policy, Signals
from fastguard.stages.cpu import decide
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.reduce import _read_on_host, _with_losses

CPU = torch.device("cpu")
RULES = {"ce": SpikeRule(window=4, warmup=2, sigma=3.0), "aux": Threshold(max=5.0)}


def names_of(*names: str) -> LossNames:
    known = LossNames(dist.HashStore())
    known.places(names)
    return known


def joined(
    names: LossNames, bad_ranks: tuple[float, float], **losses: tuple[float, int]
) -> Signals:
    """Maps each name to its sum and its number of ranks after the collective."""
    sums = torch.zeros(2, PLACES, dtype=torch.float64)
    for name, (total, n_ranks) in losses.items():
        sums[:, names.places([name])[0]] = torch.tensor([total, n_ranks]).double()
    none = Signals(torch.empty(0).double(), bad_ranks=torch.tensor(bad_ranks).double())
    return _with_losses(none, sums, names)


STEPS = [
    {"ce": (2.0, 2), "other": (1.0, 1)},
    {"ce": (2.4, 2)},
    {"ce": (1.8, 2), "aux": (4.0, 1)},
    {},
    {"aux": (math.nan, 1)},
    {"ce": (90.0, 2), "late": (3.0, 3)},
    {"aux": (12.0, 2), "ce": (2.0, 2)},
]


@pytest.mark.parametrize("mode", ["skip", "zero", "propagate"])
def test_the_same_decisions_and_records(mode: str) -> None:
    policy = Policy(torch.tensor([1.0]).double(), mode, tuple(RULES.values()), tuple(RULES))
    here, there = (GuardState.fresh(policy, CPU) for _ in range(2))
    names, recorder = names_of(*RULES), Recorder()
    bad = itertools.cycle([(0.0, 0.0), (1.0, 5.0), (2.0, 5.0)])
    for losses in STEPS:
        stats = GradStats(
            torch.tensor([[4.0], [0.0], [0.0], [0.0]]).double(), torch.zeros(3, 2).long(), 2.0
        )
        signals = joined(names, next(bad), **losses)
        on_device = reference.decide(stats, signals, there, policy)
        recorder.send(Outcome(stats, signals, on_device, there, policy.signals, 0.1))
        read = _read_on_host(signals)
        on_host = decide.decide(stats, read, here, policy)
        expected = Settled.of(Outcome(stats, read, on_host, here, policy.signals, 0.1)).record()
        assert repr(replace(recorder.wait(), time=expected.time)) == repr(expected)
        assert set(expected.losses) == set(losses)
    assert (here.rings == there.rings).all() and (here.windows == there.windows).all()


def test_names_that_another_rank_added_are_found_when_a_record_is_read() -> None:
    store = dist.HashStore()
    mine, other = LossNames(store), LossNames(store)
    assert mine.places(["a"]) == [0]
    assert other.places(["b", "a"]) == [1, 0]
    assert list(mine) == ["a"] + [""] * (OWN - 1) + [OTHERS]
    assert mine[1] == "b"  # reads the name from the store
    assert list(mine)[:2] == ["a", "b"]
    assert mine.places(["c"]) == [2] and len(mine) == PLACES
