"""Properties of clipping for any gradients."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import clip_grad as torchs

import fastguard
from guardtest.grads import NORM_TYPES, parameters, true_norm
from guardtest.tolerances import MEASURED_RTOL, NORM_RTOL

NAN, INF = math.nan, math.inf


# The properties.

# Limits and norms exclude coefficients below 1e-38, which are subnormal and less accurate.
finite = st.floats(-(2.0**110), 2.0**110, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
any_float = finite | st.sampled_from([NAN, INF, -INF])
norm_types = st.sampled_from(NORM_TYPES)
limits = st.floats(1e-3, 1e6) | st.sampled_from([0.0, 1e-3, 1.0, INF])


def lists_of(elements):
    tensors = st.lists(elements, max_size=8).map(lambda xs: torch.tensor(xs, dtype=torch.float32))
    return st.lists(tensors, min_size=1, max_size=4)


def norm_of(grads: list[Tensor], norm_type: float) -> float:
    return true_norm(grads, norm_type)


@hypothesis.given(lists_of(finite), limits, norm_types)
def test_clipping_never_increases_the_norm_and_reaches_the_limit(grads, max_norm, norm_type):
    before = norm_of(grads, norm_type)
    returned = fastguard.clip_grad_norm_(parameters(*grads), max_norm, norm_type)
    after = norm_of(grads, norm_type)
    assert after <= before
    assert after <= max_norm * (1 + 1e-6) + 1e-37
    assert returned.item() == pytest.approx(before, rel=NORM_RTOL, abs=1e-44)


@hypothesis.given(lists_of(finite), limits, norm_types)
def test_clipping_twice_equals_clipping_once(grads, max_norm, norm_type):
    params = parameters(*grads)
    fastguard.clip_grad_norm_(params, max_norm, norm_type)
    once = [g.clone() for g in grads]
    fastguard.clip_grad_norm_(params, max_norm, norm_type)
    for grad, was in zip(grads, once, strict=True):
        # The second time the coefficient is max_norm / (max_norm + 1e-6).
        again = 1.0 if max_norm == INF else max_norm / (max_norm + 1e-6)
        torch.testing.assert_close(grad, was, rtol=1.0 - again + 4e-7, atol=1e-37)


@hypothesis.given(lists_of(finite), st.sampled_from([2.0**-17, 0.5, 2.0, 2.0**17]), norm_types)
def test_the_norm_is_scale_equivariant(grads, factor, norm_type):
    plain = fastguard.measure_grads(parameters(*grads), norm_type=norm_type)
    scaled = fastguard.measure_grads(parameters(*(g * factor for g in grads)), norm_type=norm_type)
    expected = plain.total_norm64.item() * factor
    assert scaled.total_norm64.item() == pytest.approx(expected, rel=1e-6, abs=1e-37)


@hypothesis.given(lists_of(st.floats(-1e6, 1e6, width=32)), norm_types)
def test_scaled_gradients_clip_to_the_same_direction(grads, norm_type):
    grads.append(torch.tensor([0.5]))  # so that torch's 1e-6 is small compared to the norm
    limit = norm_of(grads, norm_type) / 4
    louder = [g * 4.0 for g in grads]
    fastguard.clip_grad_norm_(parameters(*grads), limit, norm_type)
    fastguard.clip_grad_norm_(parameters(*louder), limit, norm_type)
    for a, b in zip(grads, louder, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-35)


@hypothesis.given(lists_of(any_float), st.sampled_from([1e-3, 1.0, 1e6, INF]), norm_types)
def test_zero_mode_equals_torch_on_the_cleaned_copy(grads, max_norm, norm_type):
    cleaned = [g.nan_to_num(0.0, 0.0, 0.0).double() for g in grads if g.numel()]
    fastguard.clip_grad_norm_(parameters(*grads), max_norm, norm_type, nonfinite="zero")
    torchs.clip_grad_norm_(parameters(*cleaned), max_norm, norm_type)  # float64: no overflow
    for got, want in zip([g for g in grads if g.numel()], cleaned, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=4e-7, atol=1e-37)


@hypothesis.given(lists_of(st.floats(width=32)), norm_types)
def test_counts_are_exact(grads, norm_type):
    stats = fastguard.measure_grads(parameters(*grads), norm_type=norm_type)
    assert stats.nan_count.tolist() == [int(g.isnan().sum()) for g in grads]
    assert stats.posinf_count.tolist() == [int(g.isposinf().sum()) for g in grads]
    assert stats.neginf_count.tolist() == [int(g.isneginf().sum()) for g in grads]
    expected = norm_of(grads, norm_type)
    assert stats.total_norm64.item() == pytest.approx(expected, rel=MEASURED_RTOL, abs=0)
