"""Verdicts on finite gradients: shapes, and the clip coefficient of each segment."""

import math

import pytest
import torch

from fastguard import SpikeRule
from fastguard.stages.contract import Policy, Signals
from fastguard.stages.decide import decide
from fastguard.stages.formulas import clip_coefficients
from guardtest.stories import float64, outcome, reason, stats_of

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")


@pytest.mark.parametrize("nan", [0, 3])
@pytest.mark.parametrize("rules", [None, SpikeRule()])
def test_a_verdict_is_what_fused_optimizers_accept(story, rules, nan):
    verdict = story(rules, max_norm=[1.0, 2.0, INF]).step([1.0, 1.0, 1.0], nan=nan)
    assert verdict.found_inf.dtype is torch.float32 and verdict.found_inf.shape == ()
    assert verdict.found_inf.item() == float(nan > 0)
    assert verdict.clip_coef.shape == verdict.multiplier.shape == (3,)
    assert verdict.clip_coef.dtype is verdict.multiplier.dtype is torch.float64
    assert verdict.clean.shape == verdict.reason.shape == verdict.total_norm.shape == ()
    assert verdict.spikes.shape == verdict.thresholds.shape == ((0,) if rules is None else (1,))
    assert verdict.spikes.dtype is torch.bool and verdict.thresholds.dtype is torch.float64


def test_a_cpu_decides_in_floats_and_without_a_state():
    verdict = decide(stats_of(4.0), Signals.none(CPU), None, Policy(float64([2.0]), "zero"))
    assert verdict.clip_coef.tolist() == [2.0 / (4.0 + 1e-6)]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, INF])
def test_the_coefficient_is_torchs_formula(story, norm_type):
    verdict = story(max_norm=2.0).step(4.0, norm_type=norm_type)
    assert verdict.clip_coef.item() == pytest.approx(2.0 / (4.0 + 1e-6), rel=1e-14)
    assert verdict.total_norm.item() == pytest.approx(4.0, rel=1e-14)
    assert (outcome(verdict), reason(verdict)) == ("apply", None)


def test_under_the_limit_the_coefficient_is_exactly_one(story):
    assert story(max_norm=2.0).step(1.9).multiplier.tolist() == [1.0]
    assert story(max_norm=2.0).step(2.0).multiplier.tolist() == [2.0 / (2.0 + 1e-6)]
    assert story(max_norm=0.0).step(0.0).multiplier.tolist() == [0.0]


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
def test_a_limit_of_inf_never_multiplies(story, nonfinite):
    for counts in ({}, {"nan": 1}, {"posinf": 1}):
        verdict = story(nonfinite=nonfinite).step(1e300, **counts)
        assert verdict.clip_coef.tolist() == verdict.multiplier.tolist() == [1.0]


def test_each_segment_has_its_coefficient(story):
    verdict = story(max_norm=[1.0, INF, 8.0]).step([4.0, 4.0, 4.0])
    assert verdict.clip_coef.tolist() == pytest.approx([1.0 / (4 + 1e-6), 1.0, 1.0])
    assert verdict.total_norm.item() == pytest.approx(math.sqrt(48.0))


def test_one_limit_applies_to_all_segments(story):
    verdict = story(max_norm=1.0).step([4.0, 0.5])
    assert verdict.clip_coef.tolist() == [1.0 / (4.0 + 1e-6), 1.0]


def test_the_multiplier_includes_inv_scale(story):
    verdict = story(max_norm=2.0).step(4.0, inv_scale=0.25)
    assert verdict.multiplier.item() == pytest.approx(0.25 * 2.0 / (4.0 + 1e-6))
    skipped = story(max_norm=2.0).step(4.0, inv_scale=0.25, nan=1)
    assert skipped.multiplier.tolist() == [1.0]


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "raise"])
def test_finite_gradients_with_a_norm_beyond_float64_are_a_fault(story, nonfinite):
    # Sums of several ranks on a GPU, or p < 1: must not be clipped to zero silently.
    verdict = story(max_norm=1.0, nonfinite=nonfinite).step(1e200)  # its square exceeds float64
    assert verdict.total_norm == INF
    assert verdict.multiplier.tolist() == [1.0]
    assert (outcome(verdict), reason(verdict)) == ("skip", "nonfinite_grad")


def test_propagate_clips_them_to_zero_as_torch_does(story):
    verdict = story(max_norm=1.0, nonfinite="propagate").step(1e200)
    assert (verdict.total_norm, verdict.torch_norm) == (INF, INF)
    assert verdict.multiplier.tolist() == [0.0]
    assert (outcome(verdict), reason(verdict)) == ("apply", None)


def test_a_nan_norm_is_not_treated_as_a_small_norm(story):
    verdict = story(max_norm=1.0, nonfinite="propagate").step(NAN)
    assert verdict.clip_coef.isnan().all()


@pytest.mark.parametrize(
    ("norm", "limit", "coef"),
    [(4.0, 2.0, 2.0 / (4.0 + 1e-6)), (1.0, 2.0, 1.0), (INF, 2.0, 0.0), (NAN, 2.0, NAN)]
    + [(n, INF, 1.0) for n in (0.0, 1.0, INF, NAN)],
)
def test_clip_coefficients(norm, limit, coef):
    got = clip_coefficients(float64([norm]), float64([limit]))
    assert got.tolist() == pytest.approx([coef], nan_ok=True)
