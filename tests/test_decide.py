"""Stage 3 as scripted stories, told to both twins: tensors on any device, floats on a CPU."""

import math
from collections.abc import Mapping, Sequence
from types import ModuleType

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastguard import NonFiniteGradError, SpikeRule, Threshold, host_decide, reference
from fastguard.decide import (
    GuardState,
    Policy,
    Reason,
    Verdict,
    clip_coefficients,
    decide,
    propagated_norms,
    raise_if_nonfinite,
)
from fastguard.measure import GradStats
from fastguard.reduce import Signals, reduce
from fastguard.rules import Rule

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")
TWINS = {"tensors": reference, "floats": host_decide}


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def stats_of(
    norms: float | Sequence[float], nan=0, posinf=0, neginf=0, norm_type=2.0, bad_segment=0
) -> GradStats:
    """The stats of one tensor a segment; what is not finite lies in one of them."""
    norms = [norms] if isinstance(norms, float | int) else norms
    summary = torch.zeros(4, len(norms), dtype=torch.float64)
    summary[0] = float64(norms) if norm_type == INF else float64(norms).pow(norm_type)
    summary[1:, bad_segment] = float64([nan, posinf, neginf])
    return GradStats(summary, summary[1:].long(), norm_type)


class Story:
    """A guard that lives through one step after the other."""

    def __init__(
        self,
        twin: ModuleType,
        rules: Rule | Mapping[str, Rule] | None = None,
        max_norm: float | Sequence[float] = INF,
        nonfinite="skip",
    ) -> None:
        if isinstance(rules, SpikeRule | Threshold):
            rules = {"grad_norm": rules}
        limits = [max_norm] if isinstance(max_norm, float | int) else max_norm
        rules = rules or {}
        self.policy = Policy(float64(limits), nonfinite, tuple(rules.values()), tuple(rules))
        self.state = GuardState.fresh(self.policy, CPU)
        self.twin = twin

    def step(self, norms=1.0, *, losses=None, found_inf=None, inv_scale=None, **counts) -> Verdict:
        losses = losses or {}
        signals = Signals(
            float64(list(losses.values())),
            tuple(losses),
            None if inv_scale is None else float64(inv_scale),
            None if found_inf is None else torch.tensor(found_inf),
        )
        return self.twin.decide(stats_of(norms, **counts), signals, self.state, self.policy)

    def steps(self, *norms: float) -> list[str]:
        return [outcome(self.step(norm)) for norm in norms]

    def losses(self, *values: float) -> list[str]:
        return [outcome(self.step(losses={"loss": value})) for value in values]

    @property
    def baseline(self) -> list[float]:
        """What the first rule remembers."""
        n = int(self.state.rings[0, 0])
        return sorted(self.state.windows[0, :n].tolist())

    @property
    def counters(self) -> list[int]:
        return self.state.counters.tolist()


def outcome(verdict: Verdict) -> str:
    return "skip" if verdict.found_inf else "apply"


def reason(verdict: Verdict) -> str | None:
    return Reason(int(verdict.reason)).label


@pytest.fixture(params=TWINS.values(), ids=TWINS.keys())
def story(request):
    def begin(*args, **kwargs) -> Story:
        return Story(request.param, *args, **kwargs)

    return begin


# The shape of a verdict.


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


# Clipping.


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


def test_one_limit_serves_all_segments(story):
    verdict = story(max_norm=1.0).step([4.0, 0.5])
    assert verdict.clip_coef.tolist() == [1.0 / (4.0 + 1e-6), 1.0]


def test_what_the_scaler_owes_is_multiplied_in(story):
    verdict = story(max_norm=2.0).step(4.0, inv_scale=0.25)
    assert verdict.multiplier.item() == pytest.approx(0.25 * 2.0 / (4.0 + 1e-6))
    skipped = story(max_norm=2.0).step(4.0, inv_scale=0.25, nan=1)
    assert skipped.multiplier.tolist() == [1.0]


def test_a_sum_that_overflows_clips_to_nothing_and_is_no_fault(story):
    verdict = story(max_norm=1.0).step(1e200)  # its square is not a float64
    assert verdict.total_norm == INF
    assert verdict.multiplier.tolist() == [0.0]
    assert (outcome(verdict), reason(verdict)) == ("apply", None)


def test_a_nan_norm_never_passes_for_a_small_one(story):
    verdict = story(max_norm=1.0, nonfinite="propagate").step(NAN)
    assert verdict.clip_coef.isnan().all()


# Non-finite gradients and losses.

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


@pytest.mark.parametrize("found", [1.0, 2.0])  # the scaler adds up over devices
def test_what_the_scaler_found(story, found):
    for nonfinite in ("skip", "zero", "propagate"):
        verdict = story(nonfinite=nonfinite).step(found_inf=found)
        assert (outcome(verdict), reason(verdict)) == ("skip", "nonfinite_grad")
        assert verdict.found_inf.item() == 1.0
        assert outcome(story(nonfinite=nonfinite).step(found_inf=0.0)) == "apply"


def test_zero_mode_cures_what_was_counted_though_the_scaler_saw_it_too(story):
    verdict = story(nonfinite="zero").step(found_inf=1.0, posinf=1)
    assert (outcome(verdict), verdict.clean.item()) == ("apply", 1.0)


def test_raising_names_every_parameter_and_count():
    stats = GradStats(float64([[1], [3], [1], [0]]), torch.tensor([[3, 0], [0, 1], [0, 0]]), 2.0)
    with pytest.raises(
        NonFiniteGradError, match=r"3 NaN, 1 \+Inf, 0 -Inf.*parameter 0 \(3 NaN\)"
    ) as e:
        raise_if_nonfinite(stats)
    assert e.value.culprits == [("parameter 0", 3, 0, 0), ("parameter 1", 0, 1, 0)]
    raise_if_nonfinite(stats_of(1.0), Signals(float64([0.5]), ("loss",)))
    with pytest.raises(NonFiniteGradError, match="loss is non-finite: ctc=nan"):
        raise_if_nonfinite(stats_of(1.0), Signals(float64([0.5, NAN]), ("mlm", "ctc")))


def test_a_bad_loss_of_another_rank_raises_though_its_name_is_unknown_here():
    given = torch.tensor([True, False, False])
    signals = Signals(float64([NAN, 0.0, 0.0]), ("", "", ""), given=given)
    with pytest.raises(NonFiniteGradError, match="loss is non-finite: =nan;"):
        raise_if_nonfinite(stats_of(1.0), signals)


def test_a_single_process_has_nothing_to_reduce():
    stats, signals = stats_of(1.0), Signals.none(CPU)
    assert reduce(stats, signals) == (stats, signals)


# Counters.


def test_counters_of_steps_applied_skipped_and_skipped_in_a_row(story):
    guard = story()
    assert guard.counters == [0, 0, 0, 0]
    guard.step()
    assert guard.counters == [1, 1, 0, 0]
    guard.step(nan=1)
    guard.step(losses={"loss": NAN})
    assert guard.counters == [3, 1, 2, 2]
    guard.step()
    assert guard.counters == [4, 2, 2, 0]
    guard.step(posinf=1)
    assert guard.counters == [5, 2, 3, 1]


# The sigma rule.

RULE = SpikeRule(window=4, sigma=2.0, warmup=4)
THRESHOLD_1234 = 2.5 + 2.0 * math.sqrt(1.25)  # population std of 1, 2, 3, 4: 4.736...


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
    assert guard.counters == [5, 4, 1, 1]


def test_a_skipped_spike_enters_clipped_to_the_threshold(story):
    guard = story(RULE)
    guard.steps(1.0, 2.0, 3.0, 4.0, 1e6)
    assert guard.baseline == pytest.approx([2.0, 3.0, 4.0, THRESHOLD_1234])


def test_the_oldest_value_makes_room(story):
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


def test_negative_signals_spike_upwards_only(story):
    guard = story({"loss": RULE})
    assert guard.losses(-4.0, -3.0, -2.0, -1.0) == ["apply"] * 4
    assert guard.losses(-50.0) == ["apply"]
    assert guard.losses(100.0) == ["skip"]


def test_nothing_is_judged_before_the_warm_up_is_over(story):
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


# What enters the baseline.


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


def test_one_nan_loss_does_not_lock_training_out(story):
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


def test_the_norm_that_is_left_enters_in_zero_mode(story):
    guard = story(RULE, nonfinite="zero")
    guard.step(3.0, nan=1)
    assert guard.baseline == pytest.approx([3.0])


def test_a_step_that_another_rule_skips_does_not_enter(story):
    guard = story({"grad_norm": RULE, "loss": Threshold(10.0)})
    guard.step(1.0, losses={"loss": 1.0})
    guard.step(2.0, losses={"loss": 11.0})
    assert guard.baseline == [1.0]


def test_a_loss_that_is_not_given_is_not_judged_and_does_not_enter(story):
    guard = story({"loss": RULE})
    guard.losses(1.0, 2.0)
    verdict = guard.step(losses={"other": 99.0})
    assert outcome(verdict) == "apply"
    assert guard.baseline == [1.0, 2.0]


def test_huge_values_overflow_quietly(story):
    guard = story({"loss": SpikeRule(window=4, sigma=2.0, warmup=2)})
    assert guard.losses(1e200, -1e200, 1e308, 1e308, 1e308, 5.0) == ["apply"] * 6


# A lasting shift of the level.

STRICT = SpikeRule(window=4, sigma=0.01, warmup=4)  # its threshold hardly creeps upwards


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
def test_no_shift_locks_training_out(story, sigma, level):
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


# A fixed threshold, and the other actions.


def test_a_threshold_is_the_largest_value_that_passes(story):
    guard = story({"loss": Threshold(max=10.0)})
    assert guard.losses(10.0, 10.000001, 5.0, 1e30) == ["apply", "skip", "apply", "skip"]
    assert guard.state.windows.shape == (1, 0)


def test_a_threshold_never_gives_way(story):
    assert story(Threshold(10.0)).steps(*[11.0] * 300) == ["skip"] * 300


def test_action_clip_scales_to_the_threshold(story):
    guard = story(Threshold(10.0, action="clip"))
    verdict = guard.step(40.0)
    assert verdict.clip_coef.tolist() == [10.0 / (40.0 + 1e-6)]
    assert (outcome(verdict), reason(verdict)) == ("apply", "grad_spike")
    assert guard.step(9.0).clip_coef.tolist() == [1.0]


def test_action_clip_and_max_norm_the_smaller_wins(story):
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


def test_action_record_only_says_so(story):
    verdict = story(Threshold(10.0, action="record")).step(40.0)
    assert verdict.spikes.tolist() == [True]
    assert (outcome(verdict), reason(verdict)) == ("apply", "grad_spike")
    assert verdict.multiplier.tolist() == [1.0]


def test_several_rules_are_judged_apart(story):
    guard = story({"a": Threshold(1.0, action="record"), "b": Threshold(2.0), "grad_norm": RULE})
    verdict = guard.step(losses={"a": 1.5, "b": 1.5})
    assert verdict.spikes.tolist() == [True, False, False]
    assert verdict.thresholds.tolist() == [1.0, 2.0, INF]
    assert (outcome(verdict), reason(verdict)) == ("apply", "loss_spike")


# Which reason is named.

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


# The twins agree on any story, step by step and in all that they remember.


@st.composite
def rule_sets(draw):
    rules = {}
    for signal in draw(st.lists(st.sampled_from(["grad_norm", "a", "b"]), unique=True)):
        action = draw(st.sampled_from(["skip", "record"] + ["clip"] * (signal == "grad_norm")))
        if draw(st.booleans()):
            rules[signal] = Threshold(draw(st.sampled_from([0.5, 2.0, 50.0])), action=action)
        else:
            window = draw(st.integers(2, 5))
            warmup = draw(st.integers(2, window))
            rules[signal] = SpikeRule(window, draw(st.sampled_from([0.01, 2.0])), warmup, action)
    return rules


values = st.sampled_from([0.0, 0.3, 1.0, 1.1, 30.0, 1e6])
steps = st.fixed_dictionaries(
    {
        "norms": st.tuples(values, values),
        "nan": st.sampled_from([0, 0, 0, 0, 2]),
        "posinf": st.sampled_from([0, 0, 0, 0, 1]),
        "bad_segment": st.sampled_from([0, 1]),
        "losses": st.dictionaries(
            st.sampled_from(["a", "b", "c"]), values | st.sampled_from([NAN, INF, -2.0])
        ),
        "found_inf": st.sampled_from([None, None, 0.0, 2.0]),
        "inv_scale": st.sampled_from([None, 0.5]),
    }
)


@hypothesis.given(
    rule_sets(),
    st.sampled_from([(INF,), (2.0,), (INF, 0.5)]),
    st.sampled_from(["skip", "zero", "propagate"]),
    st.lists(steps, min_size=1, max_size=20),
)
@hypothesis.settings(max_examples=60)
def test_the_twins_agree(rules, max_norm, nonfinite, script):
    tensors, floats = (Story(twin, rules, max_norm, nonfinite) for twin in TWINS.values())
    for step in script:
        step = {**step, "norms": list(step["norms"])}
        one, other = tensors.step(**step), floats.step(**step)
        for field in Verdict.__slots__:
            torch.testing.assert_close(
                getattr(one, field), getattr(other, field), equal_nan=True, rtol=1e-12, atol=0
            )
        for field in GuardState.__slots__:
            a, b = getattr(tensors.state, field), getattr(floats.state, field)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("norm", "limit", "coef"),
    [(4.0, 2.0, 2.0 / (4.0 + 1e-6)), (1.0, 2.0, 1.0), (INF, 2.0, 0.0), (NAN, 2.0, NAN)]
    + [(n, INF, 1.0) for n in (0.0, 1.0, INF, NAN)],
)
def test_clip_coefficients(norm, limit, coef):
    got = clip_coefficients(float64([norm]), float64([limit]))
    assert got.tolist() == pytest.approx([coef], nan_ok=True)


def test_propagated_norms():
    counts = float64([[0, 1, 0, 0, 1], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0]])
    expected = [3.0, NAN, INF, INF, NAN]
    assert propagated_norms(float64([3.0] * 5), counts).tolist() == pytest.approx(
        expected, nan_ok=True
    )
