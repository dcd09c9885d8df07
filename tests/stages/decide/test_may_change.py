"""`Policy.may_change`: whether gradients may have to be changed, known before the verdict."""

import math
from dataclasses import replace

import pytest
import torch

from fastguard import GuardedOptimizer, SpikeRule, Threshold
from fastguard.guard import read_first
from fastguard.stages.contract import Signals
from guardtest.stories import float64

NOTHING = Signals(float64([]))
SCALED = replace(NOTHING, inv_scale=float64(0.5))
RULES = {
    "none": None,
    "skips": Threshold(2.0),
    "clips": Threshold(2.0, action="clip"),
    "records": SpikeRule(window=4, warmup=2, action="record"),
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("max_norm", [math.inf, 1.0])
def test_may_change_is_true_iff_a_step_can_change_gradients(story, max_norm, nonfinite, rules):
    guard = story(RULES[rules], max_norm=max_norm, nonfinite=nonfinite)
    policy = replace(guard.policy, limited=max_norm != math.inf)
    assert policy.may_change(SCALED)
    may = policy.may_change(NOTHING)
    assert may == (max_norm == 1.0 or nonfinite == "zero" or rules == "clips")
    steps = [{"norms": 1.5}, {"norms": 9.0}, {"norms": 0.5, "nan": 3}, {"losses": {"a": math.nan}}]
    verdicts = [guard.step(**step) for step in steps]
    changed = any(v.multiplier.item() != 1.0 or v.clean.item() for v in verdicts)
    assert changed == may  # if gradients may change, one of these steps changes them


def test_an_optimizer_without_a_limit_never_calls_apply(monkeypatch):
    def refused(*args):
        raise AssertionError("apply was called")

    monkeypatch.setattr(read_first, "apply", refused)
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    GuardedOptimizer(torch.optim.SGD([p], lr=1.0)).step()
    assert p.tolist() == [-3.0, -4.0]
    with pytest.raises(AssertionError, match="apply was called"):
        GuardedOptimizer(torch.optim.SGD([p], lr=1.0), max_norm=1.0).step()
