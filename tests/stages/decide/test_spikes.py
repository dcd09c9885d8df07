"""Decisions of spike rules: sigma rules, fixed thresholds, actions, and the recorded reason."""

import math

import pytest
import torch

from fastguard import SpikeRule, Threshold
from guardtest.stories import RULE, THRESHOLD_1234, outcome, reason

NAN, INF = math.nan, math.inf


def test_the_threshold_is_mean_plus_sigma_std(story):
    guard = story(RULE)
    assert guard.steps(1.0, 2.0, 3.0, 4.0) == ["apply"] * 4
    verdict = guard.step(4.73)
    assert verdict.thresholds.tolist() == pytest.approx([THRESHOLD_1234])
    assert (outcome(verdict), reason(verdict)) == ("apply", None)

    guard = story(RULE)
    guard.steps(1.0, 2.0, 3.0, 4.0)
    verdict = guard.step(4.74)
    assert (outcome(verdict), reason(verdict)) == ("skip", "grad_spike")
    assert verdict.spikes.tolist() == [True]
    assert verdict.multiplier.tolist() == [1.0]
    assert guard.counters == [5, 4, 1, 1, 0]


def test_a_skipped_spike_enters_clipped_to_the_threshold(story):
    guard = story(RULE)
    guard.steps(1.0, 2.0, 3.0, 4.0, 1e6)
    assert guard.baseline == pytest.approx([2.0, 3.0, 4.0, THRESHOLD_1234])


def test_the_oldest_value_is_replaced(story):
    guard = story(SpikeRule(window=3, sigma=50.0, warmup=2))
    guard.steps(1.0, 2.0, 3.0, 4.0, 5.0)
    assert guard.baseline == pytest.approx([3.0, 4.0, 5.0])


def test_a_constant_signal_tolerates_one_percent_times_sigma(story):
    for norm, expected in ((2.11, "apply"), (2.13, "skip")):
        guard = story(SpikeRule(window=8, sigma=6.0, warmup=4))
        guard.steps(*[2.0] * 8)
        assert guard.steps(norm) == [expected]  # 2 + 6 * 0.01 * 2 = 2.12


def test_a_signal_that_is_always_zero_has_a_threshold_too(story):
    guard = story({"loss": SpikeRule(window=4, sigma=6.0, warmup=4)})
    assert guard.losses(0.0, 0.0, 0.0, 0.0, 0.0, 1e-300) == ["apply"] * 5 + ["skip"]


def test_negative_signals_spike_only_upwards(story):
    guard = story({"loss": RULE})
    assert guard.losses(-4.0, -3.0, -2.0, -1.0) == ["apply"] * 4
    assert guard.losses(-50.0) == ["apply"]
    assert guard.losses(100.0) == ["skip"]


def test_no_value_is_judged_during_the_warm_up(story):
    guard = story(SpikeRule(window=8, sigma=2.0, warmup=3))
    verdict = guard.step(1.0)
    assert verdict.thresholds.tolist() == [INF]
    assert guard.steps(1e9, 1.0) == ["apply"] * 2
    assert guard.step(1.0).thresholds.item() < INF


def test_the_default_rule_passes_noise_and_catches_a_spike(story):
    guard = story(SpikeRule())
    noise = (1.0 + 0.1 * torch.randn(300, dtype=torch.float64)).tolist()
    assert guard.steps(*noise) == ["apply"] * 300
    assert guard.steps(3.0, 1.0) == ["skip", "apply"]


# A fixed threshold, and the other actions.


def test_a_threshold_is_the_largest_value_that_passes(story):
    guard = story({"loss": Threshold(max=10.0)})
    assert guard.losses(10.0, 10.000001, 5.0, 1e30) == ["apply", "skip", "apply", "skip"]
    assert guard.state.windows.shape == (1, 0)


def test_a_threshold_never_changes(story):
    assert story(Threshold(10.0)).steps(*[11.0] * 300) == ["skip"] * 300


def test_action_clip_scales_to_the_threshold(story):
    guard = story(Threshold(10.0, action="clip"))
    verdict = guard.step(40.0)
    assert verdict.clip_coef.tolist() == [10.0 / (40.0 + 1e-6)]
    assert (outcome(verdict), reason(verdict)) == ("apply", "grad_spike")
    assert guard.step(9.0).clip_coef.tolist() == [1.0]


def test_with_action_clip_and_max_norm_the_smaller_limit_applies(story):
    for limit in (1.0, 30.0):
        verdict = story(Threshold(10.0, action="clip"), max_norm=limit).step(40.0)
        assert verdict.clip_coef.tolist() == [min(limit, 10.0) / (40.0 + 1e-6)]


def test_action_clip_reaches_every_segment(story):
    verdict = story(Threshold(10.0, action="clip"), max_norm=[INF, 1.0]).step([30.0, 40.0])
    assert verdict.clip_coef.tolist() == pytest.approx([10.0 / 50.0, 1.0 / 40.0])


def test_action_clip_of_a_sigma_rule_enters_the_threshold(story):
    guard = story(SpikeRule(window=4, sigma=2.0, warmup=4, action="clip"))
    guard.steps(1.0, 2.0, 3.0, 4.0)
    verdict = guard.step(1000.0)
    assert verdict.clip_coef.item() == pytest.approx(THRESHOLD_1234 / 1000.0)
    assert outcome(verdict) == "apply"
    assert guard.baseline == pytest.approx([2.0, 3.0, 4.0, THRESHOLD_1234])


def test_action_record_only_records(story):
    verdict = story(Threshold(10.0, action="record")).step(40.0)
    assert verdict.spikes.tolist() == [True]
    assert (outcome(verdict), reason(verdict)) == ("apply", "grad_spike")
    assert verdict.multiplier.tolist() == [1.0]


def test_several_rules_are_judged_separately(story):
    guard = story({"a": Threshold(1.0, action="record"), "b": Threshold(2.0), "grad_norm": RULE})
    verdict = guard.step(losses={"a": 1.5, "b": 1.5})
    assert verdict.spikes.tolist() == [True, False, False]
    assert verdict.thresholds.tolist() == [1.0, 2.0, INF]
    assert (outcome(verdict), reason(verdict)) == ("apply", "loss_spike")


# The recorded reason.

ALL = {"grad_norm": Threshold(1.0), "loss": Threshold(1.0)}


@pytest.mark.parametrize(
    ("step", "named"),
    [
        ({"norms": 0.5, "losses": {"loss": 0.5}}, None),
        ({"norms": 0.5, "losses": {"loss": 2.0}}, "loss_spike"),
        ({"norms": 2.0, "losses": {"loss": 2.0}}, "grad_spike"),
        ({"norms": 2.0, "losses": {"loss": NAN}}, "nonfinite_loss"),
        ({"norms": 2.0, "losses": {"loss": NAN}, "nan": 1}, "nonfinite_grad"),
        ({"norms": 2.0, "losses": {"loss": 2.0}, "found_inf": 1.0}, "nonfinite_grad"),
    ],
)
def test_the_first_reason_in_order_is_named(story, step, named):
    assert reason(story(ALL).step(**step)) == named
