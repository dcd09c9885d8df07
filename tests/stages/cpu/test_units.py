"""Clipping of units on a CPU agrees with float64 and with the reference."""

import math

import numpy as np
import pytest
import torch

from fastguard import clip_grad_adaptive_
from fastguard.gradients.unit_buckets import unit_buckets
from fastguard.stages import reference_units
from fastguard.stages.cpu import row_norms, units
from guardtest.agc import assert_clipped, expected, parameters

NAN, INF = math.nan, math.inf
LIMITS = torch.tensor([0.01, 1e-3], dtype=torch.float64)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=["together", "one thread", "several threads", "divided"])
def kind(request, monkeypatch):
    """Makes even tiny tensors use the path of large tensors."""
    if request.param != "together":
        monkeypatch.setattr(units, "SMALL", 2)
        monkeypatch.setattr(units, "few", lambda sizes: request.param == "one thread")
    if request.param == "divided":
        monkeypatch.setattr(units, "LARGEST_PART", 64)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(kind, dtype):
    ps = parameters(dtype)
    wanted = [expected(p.grad, p) for p in ps]
    clip_grad_adaptive_(ps)
    assert_clipped([p.grad for p in ps], wanted)


@pytest.mark.parametrize("of", ["gradient", "weight"])
@pytest.mark.parametrize("magnitude", [1e-25, 1e30])
def test_squares_beyond_float32(kind, of, magnitude):
    ps = parameters()
    for p in ps:
        (p.grad if of == "gradient" else p.data).clamp_(-1, 1).mul_(magnitude)
    wanted = [expected(p.grad, p) for p in ps]
    clip_grad_adaptive_(ps)
    assert_clipped([p.grad for p in ps], wanted)


def test_weights_whose_squares_overflow_still_limit_their_gradients(kind):
    p = torch.nn.Parameter(torch.full((4, 7), 3e19))
    p.grad = torch.full((4, 7), 5e18)
    p.grad[1] = 0.0  # limit / norm is infinite
    wanted = expected(p.grad, p)
    clip_grad_adaptive_([p])
    assert_clipped([p.grad], [wanted])
    assert p.grad[0, 0].item() == pytest.approx(3e17)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_element_anywhere_changes_only_its_unit(kind, bad):
    for at in range(4):
        p = torch.nn.Parameter(torch.ones(4, 3, 7))
        p.grad = torch.linspace(0.001, 1.0, 84).view(4, 3, 7)
        p.grad[at, at % 3, 2 * at] = bad
        wanted = expected(p.grad, p)
        clip_grad_adaptive_([p])
        assert_clipped([p.grad], [wanted])


def test_layouts(kind):
    weight = torch.randn(6, 5, 4, 3)
    layouts = (
        weight,
        weight.contiguous(memory_format=torch.channels_last),
        weight.transpose(0, 1).contiguous().transpose(0, 1),
        torch.randn(6, 5, 4, 6)[..., ::2],
    )
    for p in map(torch.nn.Parameter, layouts):
        for grad in layouts:
            p.grad = grad.clone(memory_format=torch.preserve_format)
            wanted = expected(p.grad, p)
            clip_grad_adaptive_([p])
            assert_clipped([p.grad], [wanted])


def test_the_summary_equals_that_of_the_reference(kind):
    for seed in range(5):
        ps, others = parameters(torch.float64, seed=seed), parameters(torch.float64, seed=seed)
        (mine,) = unit_buckets([p.grad for p in ps], ps, None)
        (theirs,) = unit_buckets([p.grad for p in others], others, None)
        if seed == 3:
            ps[8].grad[2, 0, 1, 1] = others[8].grad[2, 0, 1, 1] = NAN
        one = units.clip_units(mine, LIMITS, 2.0, True)
        other = reference_units.clip_units(theirs, LIMITS, 2.0, True)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, equal_nan=True)
        assert 0 < one[1] < mine.starts[-1] and one[0].isnan() == (seed == 3)


def test_nothing_is_clipped_in_a_skipped_step():
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    for stage in (units, reference_units):
        (bucket,) = unit_buckets([p.grad], [p], None)
        summary = stage.clip_units(bucket, LIMITS, 2.0, False, skips=torch.tensor(True))
        assert summary.tolist() == [1.0, 0.0, 0.0, 0.0]
        assert (p.grad == 1.0).all()


@pytest.mark.parametrize("row", [64, 147, 255, 576, 1031, 4608, 16384, 40000])
def test_the_norm_of_a_constant_row_is_accurate(row):
    """The worst case for sums in float32, since all errors have the same sign."""
    rows = (1 + torch.rand(50, 1)).expand(50, row).contiguous()
    exact = rows[:, 0].double().numpy() * math.sqrt(row)
    for norms in (row_norms.norms_of_tensors([rows], [50]), row_norms.norms_of_stacks([rows])):
        np.testing.assert_allclose(norms, exact, rtol=5e-7)


def test_the_number_of_threads_does_not_change_a_bit():
    before = torch.get_num_threads()
    grads = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            ps = [torch.nn.Parameter(torch.randn(s)) for s in [(600, 1025), (700, 2304), (90,)]]
            for p in ps:
                p.grad = torch.randn_like(p)
            clip_grad_adaptive_(ps)
            grads.append([p.grad for p in ps])
    finally:
        torch.set_num_threads(before)
    for others in grads[1:]:
        assert all(map(torch.equal, grads[0], others))
