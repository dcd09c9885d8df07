"""Adaptive limits: the formulas of their papers, with tensors and with floats."""

import math

import numpy as np
import pytest
import torch

from fastguard import AdaGC, AdaptiveLimit, AutoClip, ZClip
from guardtest import long_tests
from guardtest.limits import ORACLES, RULES, Limited, assert_same, norms_with_faults
from guardtest.stories import outcome

NAN, INF = math.nan, math.inf
FORMS = {"tensors": True, "floats": False}


@pytest.mark.parametrize("tensors", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_thousands_of_steps_agree_with_the_paper(rule, tensors):
    guard, oracle = Limited(rule, tensors=tensors), ORACLES[type(rule)](rule)
    n_clipped = 0
    for (norm,), bad in norms_with_faults(10_000 if long_tests() else 2_000):
        limit, verdict = guard.step(norm, **bad)
        assert outcome(verdict) == ("skip" if bad else "apply")
        if bad or norm == 0:
            continue
        expected = oracle.limit(norm, norm)
        assert limit == pytest.approx(expected, rel=1e-9)
        coef = min(1.0, expected / norm)
        assert verdict.clip_coef.item() == pytest.approx(coef, rel=1e-9)
        n_clipped += coef < 1
        oracle.learn(norm, norm)
    assert 10 < n_clipped < 9_900


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_each_tensor_has_its_own_limit(rule):
    n = 3
    guard = Limited(rule, n, tensors=True)
    oracles = [ORACLES[type(rule)](rule) for _ in range(n)]
    for i, (norms, bad) in enumerate(norms_with_faults(400, n)):
        if i % 5 == 0:
            norms[1] = 0.0  # a tensor without gradient in this step
        _, verdict = guard.step(norms, **bad)
        if bad:
            continue
        total = math.hypot(*norms)
        for norm, oracle, coef in zip(norms, oracles, verdict.clip_coef.tolist(), strict=True):
            if norm > 0:
                assert coef == pytest.approx(min(1, oracle.limit(norm, total) / norm), rel=1e-9)
                oracle.learn(norm, total)


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_floats_and_tensors_give_the_same_bits(rule, nonfinite):
    tensors, floats = (Limited(rule, 1, nonfinite, tensors=t) for t in (True, False))
    for (norm,), bad in norms_with_faults(400):
        one, other = tensors.step(norm, **bad), floats.step(norm, **bad)
        if norm > 0:
            assert one[0] == other[0]
        assert_same(one[1].clip_coef.nan_to_num(7.0), other[1].clip_coef.nan_to_num(7.0))
        assert_same(tensors.state.limits, floats.state.limits)


@pytest.mark.parametrize("tensors", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_an_undone_step_changes_no_state(rule, tensors):
    guard = Limited(rule, tensors=tensors)
    for (norm,), bad in norms_with_faults(300):
        before, guard.state.undo = guard.state.limits.clone(), []
        guard.step(norm, **bad)
        for put_back in reversed(guard.state.undo):
            put_back()
        assert_same(guard.state.limits, before)
        guard.state.undo = None
        guard.step(norm, **bad)


@pytest.mark.parametrize("tensors", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_bad_steps_do_not_change_the_numbers_of_a_rule(rule, tensors):
    """Public implementations of ZClip and AutoClip compare with NaN forever after one NaN norm."""
    guard = Limited(rule, tensors=tensors)
    for (norm,), bad in norms_with_faults(200):
        before = guard.state.limits.clone()
        guard.step(norm, **bad)
        assert torch.equal(guard.state.limits, before) == (bool(bad) or norm == 0)
        assert not guard.state.limits.isnan().any()


@pytest.mark.parametrize("tensors", FORMS.values(), ids=FORMS)
def test_constant_norms_have_a_standard_deviation_of_zero(tensors):
    """A public ZClip adds 1e-6 to the standard deviation, which dominates for small norms."""
    guard = Limited(ZClip(warmup=2, max_norm=None), tensors=tensors)
    for _ in range(5):
        limit, verdict = guard.step(1e-8)
        assert (limit, verdict.clip_coef.item()) == (INF, 1.0)
    limit, verdict = guard.step(1e-5)
    assert limit == 1e-8
    assert verdict.clip_coef.item() == pytest.approx(1e-3, rel=1e-12)


@pytest.mark.parametrize("tensors", FORMS.values(), ids=FORMS)
def test_small_norms_are_clipped_exactly_to_the_limit(tensors):
    """Torch's 1e-6 in the denominator would halve a norm of 1e-6 and lower the limit each time."""
    guard = Limited(AdaGC(warmup=1), tensors=tensors)
    for _ in range(100):
        verdict = guard.step(1e-6)[1]
    assert verdict.clip_coef.item() == 1.0
    assert guard.state.limits[1].item() == pytest.approx(1e-6)


@pytest.mark.parametrize("tensors", FORMS.values(), ids=FORMS)
def test_the_average_of_adagc_starts_with_the_first_norm(tensors):
    """A public implementation starts with 0, so the minimum over the warm-up remains 0."""
    guard = Limited(AdaGC(warmup=2), tensors=tensors)
    guard.step(0.5)
    guard.step(0.7)
    assert guard.state.limits[1].item() == 0.5
    assert guard.step(0.6)[0] == 1.05 * 0.5


@pytest.mark.parametrize("tensors", FORMS.values(), ids=FORMS)
def test_autoclip_ignores_norms_outside_its_window(tensors):
    """A public implementation keeps all norms of a run."""
    guard = Limited(AutoClip(percentile=50, window=3), tensors=tensors)
    size = guard.state.limits.numel()
    assert [guard.step(norm)[0] for norm in [1.0, 2.0, 3.0, 100.0, 100.0]] == [1, 1.5, 2, 3, 100]
    assert guard.state.limits.numel() == size == 7


@pytest.mark.parametrize("tensors", FORMS.values(), ids=FORMS)
def test_equal_norms_leave_the_window_one_by_one(tensors):
    guard = Limited(AutoClip(percentile=0, window=3), tensors=tensors)
    limits = [guard.step(norm)[0] for norm in [1.0, 1.0, 2.0, 2.0, 1.0, 3.0, 3.0, 3.0]]
    assert limits == [1, 1, 1, 1, 1, 1, 1, 3]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_norm_beyond_float64_is_clipped_to_zero_as_by_torch(rule):
    for tensors in FORMS.values():
        guard = Limited(rule, 1, "propagate", tensors=tensors)
        for norm in [1.0] * 30:
            guard.step(norm)
        before = guard.state.limits.clone()
        _, verdict = guard.step(INF)
        assert verdict.clip_coef.item() in (0.0, 1.0)  # 1.0 if the rule sets no limit
        assert_same(guard.state.limits, before)


class GivenLimit(AdaptiveLimit):
    """Returns a given limit, and learns a given number."""

    initial = (0.0,)

    def __init__(self, limit=1.0, learned=1.0):
        self.says, self.learned = limit, learned

    def limit(self, norm, state, step):
        return torch.full_like(norm, self.says)

    def learn(self, norm, state, step):
        return [torch.full_like(norm, self.learned)]


@pytest.mark.parametrize(("says", "coef"), [(NAN, 1.0), (INF, 1.0), (-1.0, 0.0), (1.0, 0.5)])
def test_a_user_defined_rule_cannot_make_gradients_nan(says, coef):
    _, verdict = Limited(GivenLimit(says), tensors=True).step(2.0)
    assert verdict.clip_coef.item() == pytest.approx(coef, rel=1e-12)


def test_a_rule_cannot_learn_nan():
    guard = Limited(GivenLimit(learned=NAN), tensors=True)
    guard.step(2.0)
    assert guard.state.limits.squeeze(1).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ZClip(z=0), "ZClip z=0 must be a finite number > 0"),
        (lambda: ZClip(z=NAN), "ZClip z=nan must be"),
        (lambda: ZClip(alpha=1.0), "ZClip alpha=1.0 must be a number in [0, 1)"),
        (lambda: ZClip(warmup=1), "ZClip warmup=1 must be an integer >= 2"),
        (lambda: ZClip(max_norm=-1), "ZClip max_norm=-1 must be"),
        (lambda: AutoClip(percentile=101), "AutoClip percentile=101 must be a number from 0"),
        (lambda: AutoClip(window=0), "AutoClip window=0 must be an integer >= 1"),
        (lambda: AutoClip(window=2**30), "at most 1048576"),
        (lambda: AdaGC(ratio=INF), "AdaGC ratio=inf must be"),
        (lambda: AdaGC(beta=-0.1), "AdaGC beta=-0.1 must be"),
        (lambda: AdaGC(warmup=0), "AdaGC warmup=0 must be"),
        (lambda: AdaGC(max_norm=0), "AdaGC max_norm=0 must be"),
    ],
)
def test_invalid_settings_are_refused(make, text):
    with pytest.raises(ValueError, match="must be") as caught:
        make()
    assert text in str(caught.value)


def test_settings_of_other_number_types_give_an_equal_rule():
    assert ZClip(z=3, max_norm=1) == ZClip(z=3.0, max_norm=np.float64(1.0))
    assert repr(ZClip(z=3)) == "ZClip(z=3.0, alpha=0.97, warmup=25, max_norm=1.0)"
    assert repr(GivenLimit(2.0)) == "GivenLimit(learned=1.0, says=2.0)"
