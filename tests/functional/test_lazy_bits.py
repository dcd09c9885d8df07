"""Views with a conjugate or negative bit are measured and changed by value, not by memory."""

import math

import pytest
import torch
from torch import nn

import fastguard
from guardtest.grads import assert_bitwise_equal

NAN, INF = math.nan, math.inf
VALUES = [INF, -INF, NAN, 3.0, -4.0, 0.0, 1e30]


def reals(dtype=torch.float32):
    values = torch.tensor(VALUES)  # 1e30 is Inf in half precision
    return values.to(dtype)


def complexes():
    return torch.complex(torch.tensor(VALUES), torch.tensor(VALUES).flip(0))


def conjugate():
    """Returns the same values with the conjugate bit set."""
    return complexes().conj().resolve_conj().conj()


def negative(dtype=torch.float32):
    return torch._neg_view((-reals(dtype)).clone())


def imaginary():
    """Returns a tensor with a negative bit: the imaginary part of a conjugate view."""
    memory = torch.complex(torch.zeros(len(VALUES)), -reals())
    return memory.conj().imag


def both():
    """Returns a tensor with both bits: -conj(x)."""
    return torch._neg_view((-complexes().conj()).resolve_conj().conj())


KINDS = {
    "conjugate": (conjugate, complexes),
    "negative": (negative, reals),
    "negative half": (lambda: negative(torch.float16), lambda: reals(torch.float16)),
    "negative bfloat16": (lambda: negative(torch.bfloat16), lambda: reals(torch.bfloat16)),
    "negative double": (lambda: negative(torch.float64), lambda: reals(torch.float64)),
    "imaginary part": (imaginary, reals),
    "both": (both, complexes),
}
FUNCTIONS = {
    "propagate": lambda ps: fastguard.clip_grad_norm_(ps, 1.0),
    "zero": lambda ps: fastguard.clip_grad_norm_(ps, 1.0, nonfinite="zero"),
    "with norm": lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, torch.tensor(2.0)),
    "value": lambda ps: fastguard.clip_grad_value_(ps, 2.0),
    "sanitize": lambda ps: fastguard.sanitize_grads_(ps).counts,
    "sanitize by sign": lambda ps: (
        fastguard.sanitize_grads_(ps, nan=7.0, posinf=5.0, neginf=-9.0).counts
    ),
    "measure": lambda ps: fastguard.measure_grads(ps, per_tensor=True).counts,
    "total norm": lambda ps: fastguard.get_total_norm([p.grad for p in ps]),
}


def parameters_with(grad, n):
    """Returns n parameters, one with this gradient. With a large n, layouts are cached."""
    grads = [torch.full((2,), 0.5) for _ in range(n)]
    grads[n // 2] = grad
    params = []
    for g in grads:
        p = nn.Parameter(torch.zeros_like(g.resolve_conj().resolve_neg()))
        p.grad = g
        params.append(p)
    return params


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_equal_those_of_plain_tensors_with_the_same_values(name, kind, n):
    make, plain = KINDS[kind]
    for _ in range(2):  # the layout is new in the first iteration
        ours, theirs = parameters_with(make(), n), parameters_with(plain(), n)
        lazy = ours[n // 2].grad
        assert lazy.is_conj() or lazy.is_neg()
        assert_bitwise_equal(_values(lazy).nan_to_num(), _values(plain()).nan_to_num())
        if name == "value" and lazy.is_complex():
            with pytest.raises(TypeError, match="complex"):
                FUNCTIONS[name](ours)
            continue
        got, expected = FUNCTIONS[name](ours), FUNCTIONS[name](theirs)
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                _values(a.grad), _values(b.grad), rtol=0, atol=0, equal_nan=True
            )
        assert ours[n // 2].grad is lazy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [False, True])
def test_guarded_optimizers_count_and_clean_them_by_value(kind, flat):
    make, plain = KINDS[kind]
    if flat and make().is_complex():
        pytest.skip("flat buckets hold no complex gradients")
    weights = []
    for grad in (make(), plain()):
        p = nn.Parameter(torch.zeros_like(grad.resolve_conj().resolve_neg()))
        opt = fastguard.GuardedOptimizer(
            torch.optim.SGD([p], lr=1.0), max_norm=1.0, nonfinite="zero", flat_buckets=flat
        )
        p.grad = grad
        opt.step()
        weights.append((p.detach(), opt.records()[0].culprits))
    (ours, ours_counts), (theirs, theirs_counts) = weights
    assert ours_counts == theirs_counts
    assert_bitwise_equal(_values(ours), _values(theirs))


def _values(t):
    t = t.resolve_conj().resolve_neg()
    return torch.view_as_real(t) if t.is_complex() else t
