"""Finite gradients with powers or a norm beyond float64 are clipped correctly or skipped."""

import math

import pytest
import torch

import fastguard
from fastguard.gradients.buckets import bucketize
from fastguard.stages import reference
from fastguard.stages.apply import scale
from fastguard.stages.cpu.measure import measure_bucket as measure_on_cpu
from fastguard.stages.measure import measure
from guardtest.grads import parameters

FAR = [2e200, 1e-200, 1e-310, 1e155, 1e300]
NORM_TYPES = [1.0, 2.0, 3.0, 0.5, 10.0, math.inf]


def scaled_norm(tensors, norm_type):
    """Returns the norm, computed from elements divided by the largest one."""
    x = torch.cat([torch.view_as_real(t) if t.is_complex() else t for t in map(flat, tensors)])
    x = x.double().abs().reshape(-1)
    largest = x.max().item()
    if norm_type == math.inf or largest == 0.0:
        return largest
    return (x / largest).pow(norm_type).sum().item() ** (1.0 / norm_type) * largest


def flat(t):
    return t.reshape(-1)


def gradients(magnitude, dtype=torch.float64):
    sizes = ((3, 4), (7,), (0,), (5000,), (40, 50))
    return [torch.rand(shape).double().add(0.5).mul(magnitude).to(dtype) for shape in sizes]


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("magnitude", FAR)
def test_float64_gradients_are_clipped_by_their_norm(magnitude, norm_type):
    grads = gradients(magnitude)
    params = parameters(*grads)
    true = scaled_norm(grads, norm_type)
    limit = true / 3 if true > 1e-150 else 1e-7  # 1e-6 is added to the norm
    norm = fastguard.clip_grad_norm_(params, limit, norm_type)
    assert norm.item() == pytest.approx(true, rel=1e-12, abs=0)
    coef = min(1.0, limit / (true + 1e-6))
    for p, grad in zip(params, gradients(magnitude), strict=True):
        assert p.grad.shape == grad.shape
    after = scaled_norm([p.grad for p in params], norm_type)
    assert after == pytest.approx(true * coef, rel=1e-12, abs=0)


@pytest.mark.parametrize("norm_type", [2.0, 3.0, 0.5])
@pytest.mark.parametrize("magnitude", FAR)
def test_all_backends_measure_the_same(magnitude, norm_type):
    grads = gradients(magnitude)
    grads[3][7], grads[1][2] = math.nan, -math.inf
    buckets = bucketize(grads, segments=[0, 1, 1, 2, 0], n_segments=4)
    (bucket,) = buckets.buckets
    ours = measure_on_cpu(bucket, 4, 5, norm_type)
    plain = reference.measure_bucket(bucket, 4, 5, norm_type)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-12, atol=0)
    assert torch.equal(ours[1], plain[1])
    stats = measure(buckets, norm_type)
    finite = [g[g.isfinite()] for g in grads]
    assert stats.total_norm.item() == pytest.approx(scaled_norm(finite, norm_type), rel=1e-12)
    by_segment = [finite[0:1] + finite[4:], finite[1:3], finite[3:4]]
    expected = [scaled_norm(each, norm_type) for each in by_segment]
    assert stats.segment_norms.tolist() == pytest.approx([*expected, 0.0], rel=1e-12, abs=0)


@pytest.mark.parametrize("norm_type", [10.0, 30.0, 100.0])
@pytest.mark.parametrize("magnitude", [1e30, 1e-30, 1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_powers_of_narrower_gradients(dtype, magnitude, norm_type):
    grads = gradients(magnitude, dtype)
    true = scaled_norm(grads, norm_type)
    stats = fastguard.measure_grads(parameters(*grads), norm_type=norm_type)
    assert stats.segment_norms.item() == pytest.approx(true, rel=1e-12)
    params = parameters(*grads)
    fastguard.clip_grad_norm_(params, 1e-6, norm_type)
    after = scaled_norm([p.grad for p in params], norm_type)
    assert after == pytest.approx(true * min(1.0, 1e-6 / (true + 1e-6)), rel=2**-7)


@pytest.mark.parametrize("magnitude", [2e200, 1e-200])
def test_complex_gradients(magnitude):
    grads = [torch.complex(*(torch.rand(9).double() * magnitude for _ in "re"))]
    norm = fastguard.clip_grad_norm_(parameters(*grads), math.inf)
    assert norm.item() == pytest.approx(scaled_norm(grads, 2.0), rel=1e-12)


def test_mixed_dtypes():
    grads = [torch.full((9,), 3e30), torch.full((4,), 2e200, dtype=torch.float64), torch.ones(3)]
    stats = fastguard.measure_grads(parameters(*grads), per_tensor=True)
    assert stats.segment_norms.tolist() == pytest.approx([9e30, 4e200, 3**0.5], rel=1e-6)
    assert stats.total_norm.item() == pytest.approx(4e200, rel=1e-12)
    assert stats.power_sum.tolist()[1] == math.inf


@pytest.mark.parametrize("norm_type", [2.0, 3.0])
def test_an_inverse_scale_whose_power_exceeds_float64(norm_type):
    inv_scale = torch.tensor(2.0**-500, dtype=torch.float64)
    stats = measure(
        bucketize([torch.full((4,), 2.0**600, dtype=torch.float64)]), norm_type, inv_scale
    )
    expected = 4.0 ** (1.0 / norm_type) * 2.0**100
    assert stats.total_norm.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_a_guarded_step(scope):
    params = parameters(*gradients(2e200))
    opt = fastguard.GuardedOptimizer(
        torch.optim.SGD(params, lr=1.0), max_norm=1.0, clip_scope=scope
    )
    opt.step()
    (record,) = opt.flush()
    assert (record.action, record.reason) == ("clipped", None)
    moved = [p.norm().item() for p in params if p.numel()]
    total = math.hypot(*moved)
    assert total == pytest.approx(1.0 if scope != "tensor" else 2.0, rel=1e-9)


def test_compiled():
    params = parameters(*gradients(2e200))
    true = scaled_norm([p.grad for p in params], 2.0)

    @torch.compile(fullgraph=True, backend="eager")
    def clip():
        return fastguard.clip_grad_norm_(params, 1.0), fastguard.measure_grads(params).total_norm

    norm, after = clip()
    assert norm.item() == pytest.approx(true, rel=1e-12)
    assert after.item() == pytest.approx(1.0, rel=1e-12)


# The norm itself exceeds float64.


def too_large(p=2.0):
    return parameters(torch.full((100,), 1e308 if p > 1 else 1e300, dtype=torch.float64))


def test_propagate_returns_inf_as_torch_does():
    params, twins = too_large(), too_large()
    assert fastguard.clip_grad_norm_(params, 1.0) == math.inf
    assert torch.nn.utils.clip_grad_norm_(twins, 1.0) == math.inf
    assert params[0].grad.equal(twins[0].grad)


@pytest.mark.parametrize("norm_type", [2.0, 0.01])
def test_raise_mode_reports_a_norm_beyond_float64(norm_type):
    params = too_large(norm_type)
    before = params[0].grad.clone()
    for call in (
        lambda: fastguard.clip_grad_norm_(params, 1.0, norm_type, nonfinite="raise"),
        lambda: fastguard.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True),
        lambda: fastguard.get_total_norm([before], norm_type, error_if_nonfinite=True),
    ):
        with pytest.raises(fastguard.NonFiniteGradError, match="exceeds the largest float64"):
            call()
    assert params[0].grad.equal(before)


@pytest.mark.parametrize("mode", ["skip", "zero"])
def test_a_guard_skips_the_step(mode):
    params = too_large()
    opt = fastguard.GuardedOptimizer(torch.optim.SGD(params, lr=1.0), max_norm=1.0, nonfinite=mode)
    opt.step()
    (record,) = opt.flush()
    assert (record.action, record.reason) == ("skipped", "nonfinite_grad")
    assert record.total_norm == math.inf and params[0].eq(0).all()
    params[0].grad.fill_(3.0)
    opt.step()
    assert params[0].norm().item() == pytest.approx(1.0)


# Coefficients below the range of float32.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [1.0, 1e-3, 1e-8])
def test_a_coefficient_below_float32(dtype, max_norm):
    params = parameters(torch.full((300,), 1e38, dtype=dtype), torch.full((5,), -2e38, dtype=dtype))
    true = scaled_norm([p.grad for p in params], 2.0)
    fastguard.clip_grad_norm_(params, max_norm)
    after = scaled_norm([p.grad for p in params], 2.0)
    assert after == pytest.approx(max_norm, rel=2**-22 if dtype is torch.float32 else 2**-8)
    assert true > 1e38


@pytest.mark.parametrize("multiplier", [2.0**-140, 2.0**-101, 0.0, 1.0, math.nan])
def test_plain_scaling_agrees(multiplier):
    x = torch.tensor([3e38, -1e30, 1.0, 0.0])
    (bucket,), buckets = bucketize([x.clone()]).buckets, bucketize([x.clone()])
    factor = torch.tensor([multiplier], dtype=torch.float64)
    reference._apply_to_tensor(bucket.grads[0], factor[0], torch.zeros(()))
    scale(buckets, factor, torch.zeros(()))
    torch.testing.assert_close(
        bucket.grads[0], buckets.buckets[0].grads[0], rtol=0, atol=0, equal_nan=True
    )
    expected = x.double().mul(multiplier).float()
    torch.testing.assert_close(bucket.grads[0], expected, equal_nan=True)
