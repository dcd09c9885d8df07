"""`record` in the interpreter against `reference.pack`: every number is equal."""

import math

import pytest
import torch

from fastguard.records.device_row import Outcome, unpack
from fastguard.stages import reference
from fastguard.stages import triton as triton_stages
from fastguard.stages.contract import GuardState, Policy, Signals
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.spike_rules import SpikeRule, Threshold

CPU = torch.device("cpu")
RULES = {"grad_norm": SpikeRule(window=4, warmup=2), "loss 1": Threshold(max=0.5)}


def outcome_of(counts, n_segments=1, n_losses=0, rules=None, max_norm=1.0, lr=None):
    """A step that the reference decides, after a good step."""
    summary = torch.rand(4, n_segments, dtype=torch.float64)
    summary[1:] = 0.0
    summary[1:, -1] = counts.sum(1).double()
    rules = rules or {}
    policy = Policy(
        torch.full((1,), max_norm, dtype=torch.float64),
        "propagate",
        tuple(rules.values()),
        tuple(rules),
    )
    state = GuardState.fresh(policy, CPU)
    losses = torch.arange(n_losses, dtype=torch.float64)
    signals = Signals(losses, tuple(f"loss {i}" for i in range(n_losses)))
    reference.decide(GradStats(summary, counts * 0, 2.0), Signals.none(CPU), state, policy)
    stats = GradStats(summary, counts, 2.0)
    verdict = reference.decide(stats, signals, state, policy)
    return Outcome(stats, signals, verdict, state, tuple(rules), lr)


def assert_same_row(outcome, lr=None):
    rows = []
    for pack in (triton_stages.pack, reference.pack):
        row = torch.full((outcome.width,), -7.0, dtype=torch.float64)
        pack(row, outcome.stats, outcome.signals, outcome.verdict, outcome.state, lr)
        rows.append(unpack(row.numpy(), outcome.signals.loss_names))
    ours, theirs = rows
    if lr is None:
        ours, theirs = (repr(r).replace(f"lr={r.lr}", "") for r in rows)
    assert repr(ours) == repr(theirs)  # by repr, so that NaN equals NaN


@pytest.mark.parametrize("n_tensors", [1, 7, 8, 9, 127, 128, 129, 700])
@pytest.mark.parametrize("bad", ["none", "first", "last", "every third", "all"])
def test_culprits(n_tensors, bad):
    counts = torch.zeros(3, n_tensors, dtype=torch.int64)
    where = {
        "none": [],
        "first": [0],
        "last": [n_tensors - 1],
        "every third": range(0, n_tensors, 3),
        "all": range(n_tensors),
    }[bad]
    for i in where:
        counts[i % 3, i] = i + 1
        counts[2, i] += 2**40
    assert_same_row(outcome_of(counts))


def test_bad_elements_only_on_another_rank():
    outcome = outcome_of(torch.zeros(3, 5, dtype=torch.int64))
    outcome.stats.summary[1] = 3.0
    assert_same_row(outcome)


@pytest.mark.parametrize("max_norm", [0.1, 1e9, 0.0])
@pytest.mark.parametrize("n_segments", [1, 2, 128, 129, 300])
def test_segments(n_segments, max_norm):
    counts = torch.zeros(3, 4, dtype=torch.int64)
    assert_same_row(outcome_of(counts, n_segments, max_norm=max_norm))
    counts[0, 1] = 1  # the coefficient of its segment is NaN in propagate mode
    assert_same_row(outcome_of(counts, n_segments, max_norm=max_norm))


@pytest.mark.parametrize("rules", [{}, RULES], ids=len)
@pytest.mark.parametrize("n_losses", [0, 1, 2, 128, 130])
def test_losses_and_rules(n_losses, rules):
    counts = torch.zeros(3, 2, dtype=torch.int64)
    outcome = outcome_of(counts, n_losses=n_losses, rules=rules)
    if n_losses:
        outcome.signals.losses[-1] = math.nan
    assert_same_row(outcome)


@pytest.mark.parametrize("lr", [0.1, 0.0, 1e-300, math.nan])
def test_a_learning_rate_that_is_a_tensor(lr):
    outcome = outcome_of(torch.zeros(3, 2, dtype=torch.int64))
    assert_same_row(outcome, torch.tensor(lr, dtype=torch.float64))
