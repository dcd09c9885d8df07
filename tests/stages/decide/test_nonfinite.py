"""Verdicts on non-finite gradients and losses, and the counters."""

import dataclasses
import math

import pytest
import torch

from fastguard import NonFiniteGradError
from fastguard.stages.contract import Signals
from fastguard.stages.decide import raise_if_nonfinite
from fastguard.stages.formulas import propagated_norms
from fastguard.stages.grad_stats import GradStats
from guardtest.stories import RULE, float64, outcome, reason, stats_of

NAN, INF = math.nan, math.inf
BAD = {"nan": {"nan": 2}, "+inf": {"posinf": 1}, "-inf": {"neginf": 1}}


@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_gradients(story, bad):
    skipped = story(max_norm=1.0).step(4.0, **BAD[bad])
    assert (outcome(skipped), reason(skipped)) == ("skip", "nonfinite_grad")
    assert skipped.multiplier.tolist() == [1.0] and skipped.clean == 0.0

    cleaned = story(max_norm=1.0, nonfinite="zero").step(4.0, **BAD[bad])
    assert (outcome(cleaned), reason(cleaned)) == ("apply", "nonfinite_grad")
    assert cleaned.multiplier.tolist() == [1.0 / (4.0 + 1e-6)] and cleaned.clean == 1.0

    passed_on = story(max_norm=1.0, nonfinite="propagate").step(4.0, **BAD[bad])
    assert (outcome(passed_on), reason(passed_on)) == ("apply", "nonfinite_grad")
    expected = NAN if bad == "nan" else 0.0
    assert passed_on.multiplier.tolist() == pytest.approx([expected], nan_ok=True)
    assert passed_on.clean == 0.0


def test_propagated_nonfinite_elements_stay_in_their_segment(story):
    propagating = story(max_norm=1.0, nonfinite="propagate")
    verdict = propagating.step([4.0, 4.0, 0.5], posinf=1, bad_segment=1)
    assert verdict.clip_coef.tolist() == [1.0 / (4.0 + 1e-6), 0.0, 1.0]
    verdict = propagating.step([4.0, 4.0, 0.5], nan=1, posinf=1, bad_segment=2)
    assert verdict.clip_coef.tolist() == pytest.approx([1 / (4 + 1e-6)] * 2 + [NAN], nan_ok=True)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nonfinite_losses(story, value):
    for nonfinite in ("skip", "zero"):
        verdict = story(nonfinite=nonfinite).step(losses={"a": 1.0, "b": value})
        assert (outcome(verdict), reason(verdict)) == ("skip", "nonfinite_loss")
    verdict = story(nonfinite="propagate").step(losses={"a": 1.0, "b": value})
    assert (outcome(verdict), reason(verdict)) == ("apply", None)


@pytest.mark.parametrize("found", [1.0, 2.0])  # the scaler sums over devices
def test_found_inf_of_the_scaler(story, found):
    for nonfinite in ("skip", "zero", "propagate"):
        verdict = story(nonfinite=nonfinite).step(found_inf=found)
        assert (outcome(verdict), reason(verdict)) == ("skip", "nonfinite_grad")
        assert verdict.found_inf.item() == 1.0
        assert outcome(story(nonfinite=nonfinite).step(found_inf=0.0)) == "apply"


def test_zero_mode_cleans_elements_that_the_scaler_found_too(story):
    verdict = story(nonfinite="zero").step(found_inf=1.0, posinf=1)
    assert (outcome(verdict), verdict.clean.item()) == ("apply", 1.0)


@pytest.mark.parametrize("found", [1.0, 2.0])
@pytest.mark.parametrize("counted", [0, 3])
def test_an_overflow_that_only_lowers_a_loss_scale(story, found, counted):
    """The step is skipped in every mode, even in zero mode, and is not an incident."""
    for nonfinite in ("skip", "zero", "raise", "propagate"):
        guard = story(RULE, nonfinite=nonfinite)
        guard.steps(1.0, 2.0, 3.0, 4.0)
        verdict = guard.step(found_inf=found, scale_falls=True, inv_scale=0.5, posinf=counted)
        assert (outcome(verdict), reason(verdict)) == ("skip", "loss_scale")
        assert (verdict.clean, verdict.multiplier.tolist()) == (0.0, [1.0])
        assert guard.baseline == [1.0, 2.0, 3.0, 4.0]
        assert guard.counters == [5, 4, 1, 0, 1]


def test_an_overflow_that_a_lower_scale_does_not_fix(story):
    """The scale is at its minimum or unknown, or the loss is not finite."""
    for nonfinite in ("skip", "propagate"):
        for more in (
            {"scale_falls": False},
            {"scale_falls": None},
            {"scale_falls": True, "losses": {"seg": 1.0, "box": NAN}},
        ):
            guard = story(nonfinite=nonfinite)
            verdict = guard.step(found_inf=1.0, posinf=1, **more)
            assert (outcome(verdict), reason(verdict)) == ("skip", "nonfinite_grad")
            assert guard.counters == [1, 0, 1, 1, 0]
    # The scaler has not found this NaN.
    verdict = story().step(found_inf=0.0, scale_falls=True, nan=1)
    assert reason(verdict) == "nonfinite_grad"
    cleaned = story(nonfinite="zero").step(found_inf=1.0, posinf=1, scale_falls=False)
    assert (outcome(cleaned), cleaned.clean.item()) == ("apply", 1.0)


def test_loss_scale_skips_neither_count_as_consecutive_skips_nor_reset_them(story):
    guard = story()
    for expected, step in (
        (1, {"nan": 1}),
        (1, {"found_inf": 1.0, "scale_falls": True}),
        (2, {"nan": 1}),
        (0, {}),
        (0, {"found_inf": 1.0, "scale_falls": True}),
    ):
        guard.step(**step)
        assert guard.counters[3] == expected
    assert guard.counters == [5, 1, 4, 0, 2]


def test_the_error_names_every_parameter_and_count():
    stats = GradStats(float64([[1], [3], [1], [0]]), torch.tensor([[3, 0], [0, 1], [0, 0]]), 2.0)
    with pytest.raises(
        NonFiniteGradError, match=r"3 NaN, 1 \+Inf, 0 -Inf.*parameter 0 \(3 NaN\)"
    ) as e:
        raise_if_nonfinite(stats)
    assert e.value.culprits == [("parameter 0", 3, 0, 0), ("parameter 1", 0, 1, 0)]
    raise_if_nonfinite(stats_of(1.0), Signals(float64([0.5]), ("loss",)))
    search = Signals(
        float64([0.5]), ("loss",), None, torch.ones(()), scale_falls=torch.tensor(True)
    )
    raise_if_nonfinite(stats, search)
    for other in (
        dataclasses.replace(search, scale_falls=torch.tensor(False)),
        dataclasses.replace(search, scale_falls=None),
        dataclasses.replace(search, found_inf=torch.zeros(())),
        dataclasses.replace(search, losses=float64([NAN])),
    ):
        with pytest.raises(NonFiniteGradError, match="parameter 0"):
            raise_if_nonfinite(stats, other)
    with pytest.raises(NonFiniteGradError, match="loss is non-finite: ctc=nan"):
        raise_if_nonfinite(stats_of(1.0), Signals(float64([0.5, NAN]), ("mlm", "ctc")))


def test_a_bad_loss_of_another_rank_raises_even_if_its_name_is_unknown():
    given = torch.tensor([True, False, False])
    signals = Signals(float64([NAN, 0.0, 0.0]), ("", "", ""), given=given)
    with pytest.raises(NonFiniteGradError, match="loss is non-finite: =nan;"):
        raise_if_nonfinite(stats_of(1.0), signals)


def test_propagated_norms():
    counts = float64([[0, 1, 0, 0, 1], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0]])
    expected = [3.0, NAN, INF, INF, NAN]
    assert propagated_norms(float64([3.0] * 5), counts).tolist() == pytest.approx(
        expected, nan_ok=True
    )


# Counters.


def test_counters_of_steps_applied_skipped_and_skipped_in_a_row(story):
    guard = story()
    assert guard.counters == [0, 0, 0, 0, 0]
    guard.step()
    assert guard.counters == [1, 1, 0, 0, 0]
    guard.step(nan=1)
    guard.step(losses={"loss": NAN})
    assert guard.counters == [3, 1, 2, 2, 0]
    guard.step()
    assert guard.counters == [4, 2, 2, 0, 0]
    guard.step(posinf=1)
    assert guard.counters == [5, 2, 3, 1, 0]
