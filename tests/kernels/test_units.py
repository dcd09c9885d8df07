"""Adaptive gradient clipping in the interpreter agrees with float64 and with the reference."""

import math
from dataclasses import replace

import pytest
import torch

from fastguard.gradients.buckets import BucketMemo
from fastguard.gradients.unit_buckets import unit_buckets
from fastguard.stages import reference_units as reference
from fastguard.stages import triton as triton_stages
from guardtest.agc import assert_clipped, expected, parameters
from guardtest.tolerances import INTERPRETER_BF16_RTOL

NAN, INF = math.nan, math.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LIMITS = torch.tensor([0.01, 1e-3], dtype=torch.float64)


def units_of(ps, norm_type=2.0):
    return unit_buckets([p.grad for p in ps], ps, None, norm_type)


def both(ps, norm_type=2.0, propagates=True, inv_scale=None, limits=LIMITS):
    """Returns the coefficients of kernel and reference; the kernel scales the gradients."""
    for units in units_of(ps, norm_type):
        with torch.no_grad():
            given = (units, limits, norm_type, propagates, inv_scale)
            coefs, wanted = triton_stages.unit_coefs(*given), reference.unit_coefs(*given)
            triton_stages.scale_units(units, coefs)
        yield coefs, wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, INF])
def test_every_shape_and_dtype(dtype, norm_type):
    ps = parameters(dtype)
    wanted = [expected(p.grad, p, p=norm_type) for p in ps]
    for coefs, want in both(ps, norm_type):
        rtol = 1e-7 if dtype.itemsize == 2 else 1e-12  # two squares are added in float32
        torch.testing.assert_close(coefs, want, rtol=rtol, atol=0)
        assert 5 < (coefs < 1).sum() < len(coefs)
    if dtype is not torch.bfloat16:  # the interpreter truncates bfloat16
        assert_clipped([p.grad for p in ps], wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_matches_the_reference(dtype):
    ps, others = parameters(dtype), parameters(dtype)
    for p, other in zip(ps, others, strict=True):
        if p.numel():
            p.grad.view(-1)[-1] = other.grad.view(-1)[-1] = NAN
    (units,), (other_units,) = units_of(ps), units_of(others)
    n = units.starts[-1]
    coefs = torch.rand(n, dtype=torch.float64)
    coefs[::3] = 1.0
    coefs[1::7] = NAN
    coefs[2::7] = 1e-41  # subnormal in float32
    with torch.no_grad():
        triton_stages.unit_coefs(units, LIMITS, 2.0, True)
        triton_stages.scale_units(units, coefs)
        reference.scale_units(other_units, coefs)
    truncates = dtype is torch.bfloat16
    rtol, atol = (INTERPRETER_BF16_RTOL, 1e-37) if truncates else (0, 0)
    for p, other in zip(ps, others, strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("skips", [None, False, True])
def test_clip_units_matches_the_reference(skips):
    ps, others = parameters(), parameters()
    before = [p.grad.clone() for p in ps]
    (units,), (other_units,) = units_of(ps), units_of(others)
    skipped = None if skips is None else torch.tensor(skips)
    with torch.no_grad():
        given = (LIMITS, 2.0, True, None, skipped)
        values = triton_stages.clip_units(units, *given)
        wanted = reference.clip_units(other_units, *given)
    torch.testing.assert_close(values, wanted, rtol=1e-12, atol=0)
    assert (values[1] == 0) == bool(skips)
    for p, other, old in zip(ps, others, before, strict=True):
        torch.testing.assert_close(p.grad, other.grad)
        assert not skips or torch.equal(p.grad, old)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("propagates", [True, False])
def test_bad_units(dtype, propagates):
    p = torch.nn.Parameter(torch.ones(7, 9, dtype=dtype))
    p.grad = torch.ones(7, 9, dtype=dtype)
    p.grad[1, 8], p.grad[2, 0], p.grad[4, 0], p.grad[4, 1] = NAN, INF, -INF, NAN
    p.data[5, 0], p.data[6, 1] = NAN, -INF
    ((coefs, wanted),) = both([p], propagates=propagates)
    torch.testing.assert_close(coefs, wanted, rtol=1e-12, atol=0, equal_nan=True)
    assert coefs[5:].tolist() == [1.0, 1.0]
    assert coefs[[1, 4]].isnan().all() == propagates and (coefs[2] == 0.0) == propagates


@pytest.mark.parametrize("magnitude", [1e-30, 1e30, 3e38])
def test_squares_that_overflow_float32(magnitude):
    ps = parameters()
    for p in ps:
        p.grad.clamp_(-1, 1).mul_(magnitude)
    wanted = [expected(p.grad, p) for p in ps]
    list(both(ps))
    assert_clipped([p.grad for p in ps], wanted)


def test_squares_that_overflow_float64():
    p = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    p.grad = torch.tensor([[3e200, 0.0, 4e200], [0.0, 0.0, 1e-3]], dtype=torch.float64)
    ((coefs, _),) = both([p])
    assert coefs.tolist() == [pytest.approx(0.01 * math.sqrt(3) / 5e200, rel=1e-12), 1.0]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "holes"])
def test_layouts(layout):
    x = torch.randn(6, 5, 4, 3)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        x = torch.randn(6, 5, 4, 6)[..., ::2]
    before = triton_stages.diagnostics()["copied_gradients"]
    p = torch.nn.Parameter(x)
    p.grad = x.clone()
    if layout == "holes":
        p.grad = torch.randn(6, 5, 4, 6)[..., ::2]
    wanted = expected(p.grad, p)
    list(both([p]))
    assert_clipped([p.grad], [wanted])
    copied = triton_stages.diagnostics()["copied_gradients"] - before
    assert (copied == 0) == (layout == "channels_last")


def test_a_loss_scale_does_not_change_coefficients():
    ps, scaled = parameters(), parameters()
    for p in scaled:
        p.grad.mul_(1024.0)
    inv_scale = torch.tensor(1 / 1024, dtype=torch.float64)
    ((coefs, _),), ((of_scaled, wanted),) = both(ps), both(scaled, inv_scale=inv_scale)
    torch.testing.assert_close(of_scaled, coefs, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_scaled, wanted, rtol=1e-12, atol=0)


def test_other_limits_have_another_table():
    ps = parameters()
    for p in ps:
        p.grad.fill_(1.0)
    halved = torch.tensor([0.005, 1e-3], dtype=torch.float64)
    (units,) = units_of(ps)
    with torch.no_grad():
        one = triton_stages.unit_coefs(units, LIMITS, 2.0, True)
        other = triton_stages.unit_coefs(units, halved, 2.0, True)
    torch.testing.assert_close(other, one / 2)


def test_calls_are_deterministic_and_increment_version_counters():
    ps = parameters()
    (units,) = units_of(ps)
    with torch.no_grad():
        first = triton_stages.unit_coefs(units, LIMITS, 2.0, True)
        fresh = replace(units, bucket=replace(units.bucket, memo=BucketMemo()))
        assert torch.equal(first, triton_stages.unit_coefs(fresh, LIMITS, 2.0, True))
        versions = [p.grad._version for p in ps]
        triton_stages.scale_units(units, first)
    assert all(p.grad._version > v for p, v in zip(ps, versions, strict=True))


def test_neighbors_of_a_row_do_not_change():
    whole = torch.ones(100)
    p = torch.nn.Parameter(torch.ones(3, 9))
    p.grad = whole[1:28].view(3, 9)
    list(both([p]))
    want = torch.full((100,), 0.01)
    want[[0, *range(28, 100)]] = 1.0
    torch.testing.assert_close(whole, want)
