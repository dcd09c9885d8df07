"""Cases in which torch's norm is inaccurate and ours is accurate; dtypes of the norm."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad as torchs

import fastguard
from guardtest.grads import (
    NORM_TYPES,
    assert_bitwise_equal,
    copies,
    grads_of,
    parameters,
    true_norm,
)
from guardtest.tolerances import NORM_RTOL, scale_rtol

NAN, INF = math.nan, math.inf


# Cases in which torch's norm is inaccurate and ours is accurate.


def relative_error(norm: Tensor, tensors: list[Tensor], norm_type: float = 2.0) -> float:
    truth = true_norm(tensors, norm_type)
    return abs(norm.item() / truth - 1.0)


@pytest.mark.parametrize(
    ("tensor", "torchs_error"),
    [
        (lambda: torch.full((2**22,), 0.01), 1e-3),
        (lambda: torch.randn(2**22), 1e-5),
        (lambda: torch.randn(100_000).bfloat16(), 1e-4),
        (lambda: torch.randn(1000).bfloat16() * 0.1, 1e-4),
        (lambda: torch.randn(100_000).half(), 1e-5),
    ],
    ids=["constant", "normal", "bf16", "small bf16", "fp16"],
)
def test_norm_accuracy_where_torch_loses_digits(tensor, torchs_error):
    tensors = [tensor()]
    assert relative_error(torchs._get_total_norm(tensors), tensors) > torchs_error
    assert relative_error(fastguard.get_total_norm(tensors), tensors) < NORM_RTOL


@pytest.mark.parametrize(
    ("grad", "torchs_norm"),
    [
        (torch.full((10,), 6e4).half(), INF),
        (torch.full((10,), 1e20), INF),
        (torch.full((10,), 1.9e19), INF),  # squares above the largest float32
        (torch.full((10,), 1e-25), 0.0),
        (torch.full((10,), 1e-30).bfloat16(), 0.0),
    ],
    ids=["fp16 overflows", "1e20", "1.9e19", "1e-25", "bf16 1e-30"],
)
def test_magnitudes_that_torch_cannot_square(grad, torchs_norm):
    # In fused norm kernels of other libraries, a finite element above 1.8e19 overflows.
    assert torchs._get_total_norm([grad]) == torchs_norm
    norm = fastguard.get_total_norm([grad])
    assert norm.dtype is torch.float32
    assert relative_error(norm, [grad]) < NORM_RTOL
    assert fastguard.measure_grads(parameters(grad)).found_nonfinite == 0.0


def test_large_finite_gradients_are_clipped_where_torch_zeroes_them():
    ours = parameters(torch.tensor([3e20, -4e20]), torch.tensor([1.0]))
    theirs = copies(ours)
    assert torchs.clip_grad_norm_(theirs, 1.0) == INF
    assert theirs[0].grad.tolist() == [0.0, -0.0]
    assert fastguard.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True) == pytest.approx(5e20)
    assert ours[0].grad.tolist() == pytest.approx([0.6, -0.8])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-25, 1e-10, 1.0, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_magnitude_is_clipped_to_the_limit(dtype, magnitude):
    grads = [(torch.randn(n) * magnitude).to(dtype) for n in (10, 200)]
    truth = true_norm(grads)
    limit = truth * 0.25
    fastguard.clip_grad_norm_(parameters(*grads), limit)
    expected = truth * limit / (truth + 1e-6) if truth + 1e-6 > limit else truth
    if limit / (truth + 1e-6) > 1:
        expected = truth
    assert true_norm(grads) == pytest.approx(expected, rel=4 * scale_rtol(dtype))


def test_an_infinite_and_a_huge_finite_element():
    grads = [torch.tensor([1e30]), torch.tensor([INF])]
    assert fastguard.get_total_norm(grads) == INF
    stats = fastguard.measure_grads(parameters(*grads))
    assert stats.culprits() == [("parameter 1", 0, 1, 0)]
    assert stats.total_norm == pytest.approx(1e30)


@pytest.mark.parametrize("where", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_inf_norm_keeps_nan(dtype, where):
    # A max() by comparisons would drop NaN, since all comparisons with it are False.
    grads = [torch.ones(5).to(dtype), torch.arange(7.0).to(dtype)]
    grads[where][where] = NAN
    assert fastguard.get_total_norm(grads, INF).isnan()
    norm = fastguard.clip_grad_norm_(parameters(*grads), 1.0, INF, nonfinite="zero")
    assert norm == (6.0 if where != -1 else 5.0)


def test_a_nan_norm_is_treated_as_too_large():
    # NaN > threshold is False.
    ours = parameters(torch.tensor([NAN, 5.0]))
    fastguard.clip_grad_norm_(ours, 1.0, nonfinite="zero")
    assert ours[0].grad.tolist() == pytest.approx([0.0, 1.0], rel=1e-6)


def test_scaling_never_multiplies_nan_by_zero():
    # 0 * NaN is NaN, so multiplying by 0 would not remove the NaN.
    ours = parameters(torch.tensor([NAN, INF, 5.0]))
    fastguard.clip_grad_norm_(ours, 0.0, nonfinite="zero")
    assert ours[0].grad.tolist() == [0.0, 0.0, 0.0]


# dtypes and devices of results; complex gradients.


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16,), torch.float32),
        ((torch.bfloat16,), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float64,), torch.float64),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_the_dtype_of_the_norm(dtypes, expected, norm_type):
    grads = [torch.ones(3, dtype=d) for d in dtypes]
    assert fastguard.get_total_norm(grads, norm_type).dtype is expected
    assert fastguard.clip_grad_norm_(parameters(*grads), 1.0, norm_type).dtype is expected
    grads[0][0] = NAN
    assert fastguard.clip_grad_norm_(parameters(*grads), 1.0, norm_type).dtype is expected


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_have_the_2_norm(dtype):
    grads = [torch.randn(5, dtype=dtype), torch.randn(3), torch.randn(2, 2, dtype=dtype).mH]
    ours = parameters(*grads)
    theirs = copies(ours)
    norm = fastguard.clip_grad_norm_(ours, 0.5)
    expected = torchs.clip_grad_norm_(theirs, 0.5)
    assert norm.dtype is (torch.float64 if dtype is torch.complex128 else torch.float32)
    torch.testing.assert_close(norm, expected.real.to(norm.dtype), rtol=1e-6, atol=0)
    for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_other_norms_of_complex_gradients_are_refused_and_nothing_is_changed():
    grads = [torch.tensor([9.0, -9.0]), torch.tensor([9 + 9j])]
    before = [g.clone() for g in grads]
    params = parameters(*grads)
    for call in (
        lambda: fastguard.clip_grad_norm_(params, 1.0, 1.0),
        lambda: fastguard.get_total_norm(grads, INF),
        lambda: fastguard.measure_grads(params, norm_type=3.0),
        lambda: fastguard.clip_grad_value_(params, 1.0),
    ):
        with pytest.raises(TypeError, match="parameter 1 is complex"):
            call()
    for grad, was in zip(grads, before, strict=True):
        assert_bitwise_equal(
            torch.view_as_real(grad) if grad.is_complex() else grad,
            torch.view_as_real(was) if was.is_complex() else was,
        )
