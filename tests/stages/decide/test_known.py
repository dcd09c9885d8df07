"""The Python numbers in a `HostVerdict` equal its tensors."""

import math

import pytest
import torch

from fastguard import SpikeRule, Threshold
from fastguard.stages.contract import HostVerdict, Policy, Signals
from fastguard.stages.cpu import decide as cpu_decide
from fastguard.stages.grad_stats import GradStats
from guardtest.stories import Story

NAN, INF = math.nan, math.inf
RULES = {"grad_norm": SpikeRule(window=4, sigma=2.0, warmup=2, action="clip"), "a": Threshold(5.0)}
STEPS = {
    "quiet": {},
    "clipped": {"norms": [30.0, 40.0]},
    "one segment is bad": {"nan": 2, "posinf": 1, "bad_segment": 1},
    "a loss is bad": {"losses": {"a": NAN, "b": 1.0}},
    "a loss spikes": {"losses": {"a": 9.0}},
    "scaled": {"inv_scale": 0.5},
    "overflow": {"found_inf": 1.0},
}


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("n_segments", [1, 2])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_numbers_equal_the_tensors(step, n_segments, nonfinite):
    step = {"norms": [1.0, 2.0], **step}
    step["norms"] = step["norms"][-n_segments:]
    if n_segments == 1:
        step.pop("bad_segment", None)
    story = Story(cpu_decide, RULES, [10.0], nonfinite)
    story.steps(*[[1.0, 2.0][-n_segments:]] * 3)
    verdict = story.step(**step)
    assert isinstance(verdict, HostVerdict)
    known, losses = verdict.known, step.get("losses", {})
    told = {
        "total_norm": verdict.total_norm.item(),
        "clip_coef": verdict.clip_coef.amin().item(),
        "skipped": verdict.found_inf.item() == 1.0,
        "cleaned": verdict.clean.item() == 1.0,
        "changes_gradients": bool(verdict.clean) or bool((verdict.multiplier != 1.0).any()),
        "reason": verdict.reason.item(),
        "nonfinite_counts": [step.get("nan", 0), step.get("posinf", 0), 0],
        "losses": losses,
        "spikes": verdict.spikes.tolist(),
        "thresholds": verdict.thresholds.tolist(),
        "step": story.counters[0],
        "consecutive_skips": story.counters[3],
    }
    assert set(told) == set(known._fields) - {"limit"}
    assert known.limit is None  # the fixed limit is in the policy
    for name, value in told.items():
        mine = getattr(known, name)
        mine = list(mine) if name == "nonfinite_counts" else mine
        assert mine == pytest.approx(value, nan_ok=True, rel=0, abs=0), name


def test_a_verdict_without_segments():
    stats = GradStats(torch.zeros(4, 0).double(), torch.zeros(3, 0).long(), 2.0)
    policy = Policy(torch.ones(1).double())
    known = cpu_decide.decide(stats, Signals.none(torch.device("cpu")), None, policy).known
    assert known.clip_coef == 1.0 and not known.changes_gradients
