"""The baseline of a sigma rule, and how it adapts to a lasting shift."""

import math

import pytest
import torch

from fastguard import SpikeRule, Threshold
from guardtest.stories import RULE, THRESHOLD_1234, outcome

NAN, INF = math.nan, math.inf


def test_nonfinite_values_never_enter(story):
    guard = story({"loss": RULE})
    guard.losses(1.0, 2.0, NAN, INF, -INF, 3.0)
    assert guard.baseline == [1.0, 2.0, 3.0]
    for nonfinite in ("skip", "propagate"):
        guard = story(RULE, nonfinite=nonfinite)
        guard.step(1.0)
        guard.step(7.0, nan=1)
        guard.step(7.0, posinf=1)
        assert guard.baseline == [1.0]


def test_a_nan_neither_spikes_nor_poisons_the_threshold(story):
    guard = story({"loss": RULE}, nonfinite="propagate")
    guard.losses(1.0, 2.0, 3.0, 4.0)
    verdict = guard.step(losses={"loss": NAN})
    assert (outcome(verdict), verdict.spikes.tolist()) == ("apply", [False])
    assert guard.step(losses={"loss": 5.0}).thresholds.tolist() == pytest.approx([THRESHOLD_1234])


def test_a_nan_loss_does_not_block_later_steps(story):
    guard = story({"loss": RULE})
    guard.losses(1.0, 2.0, 3.0, 4.0)
    assert guard.losses(NAN, 2.0, 3.0) == ["skip", "apply", "apply"]


def test_zero_gradients_do_not_enter(story):
    guard = story(RULE)
    assert guard.steps(1.0, 0.0, 0.0, 2.0) == ["apply"] * 4
    assert guard.baseline == pytest.approx([1.0, 2.0])
    guard = story({"loss": RULE})
    guard.step(0.0, losses={"loss": 5.0})
    assert guard.baseline == []


def test_in_zero_mode_the_norm_of_the_finite_elements_enters(story):
    guard = story(RULE, nonfinite="zero")
    guard.step(3.0, nan=1)
    assert guard.baseline == pytest.approx([3.0])


def test_a_step_that_another_rule_skips_does_not_enter(story):
    guard = story({"grad_norm": RULE, "loss": Threshold(10.0)})
    guard.step(1.0, losses={"loss": 1.0})
    guard.step(2.0, losses={"loss": 11.0})
    assert guard.baseline == [1.0]


def test_a_missing_loss_is_not_judged_and_does_not_enter(story):
    guard = story({"loss": RULE})
    guard.losses(1.0, 2.0)
    verdict = guard.step(losses={"other": 99.0})
    assert outcome(verdict) == "apply"
    assert guard.baseline == [1.0, 2.0]


def test_huge_values_overflow_without_an_error(story):
    guard = story({"loss": SpikeRule(window=4, sigma=2.0, warmup=2)})
    assert guard.losses(1e200, -1e200, 1e308, 1e308, 1e308, 5.0) == ["apply"] * 6


# A lasting level shift.

STRICT = SpikeRule(window=4, sigma=0.01, warmup=4)  # the threshold hardly rises


def test_a_lasting_level_shift_becomes_the_baseline_after_window_skips(story):
    guard = story(STRICT)
    guard.steps(1.0, 1.0, 1.0, 1.0)
    assert guard.steps(*[100.0] * 12) == ["skip"] * 4 + ["apply"] * 8
    assert guard.baseline == [100.0] * 4
    assert guard.steps(200.0, 100.0) == ["skip", "apply"]


def test_a_shift_that_ends_starts_the_count_again(story):
    guard = story(STRICT)
    guard.steps(1.0, 1.0, 1.0, 1.0)
    assert guard.steps(*[100.0] * 3, 1.0, *[100.0] * 5) == (
        ["skip"] * 3 + ["apply"] + ["skip"] * 4 + ["apply"]
    )


@pytest.mark.parametrize("sigma", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("level", [2.0, 1e6])
def test_no_shift_blocks_training_forever(story, sigma, level):
    guard = story(SpikeRule(window=16, sigma=sigma, warmup=8))
    noise = (1.0 + 0.01 * torch.randn(128, dtype=torch.float64)).tolist()
    guard.steps(*noise[:32])
    outcomes = guard.steps(*(level * n for n in noise[32:]))
    first = outcomes.index("apply")
    assert 1 <= first <= 16
    assert outcomes[first:].count("skip") < 0.2 * len(outcomes)


def test_faults_and_missing_losses_neither_count_nor_break_a_shift(story):
    guard = story({"loss": STRICT})
    guard.losses(1.0, 1.0, 1.0, 1.0)
    assert guard.losses(9.0, 9.0, 9.0) == ["skip"] * 3
    guard.step(nan=1)
    guard.step(losses={"other": 1.0})
    guard.step(losses={"loss": NAN})
    assert guard.losses(9.0, 9.0) == ["skip", "apply"]
