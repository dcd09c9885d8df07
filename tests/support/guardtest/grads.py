"""Gradients and parameters for tests, with float64 references of their norms."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from guardtest.tolerances import scale_rtol

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
NORM_TYPES = [1.0, 2.0, 3.5, math.inf]


def parameters(*grads: Tensor | None) -> list[nn.Parameter]:
    """One parameter per gradient; None gives a parameter without a gradient."""
    made = []
    for grad in grads:
        like = torch.empty(1) if grad is None else grad
        p = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype))
        p.grad = grad
        made.append(p)
    return made


def copies(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Copies of parameters and gradients, equal bit for bit and with equal strides."""
    return parameters(*(None if p.grad is None else p.grad.clone() for p in params))


def grads_of(params: Iterable[nn.Parameter]) -> list[Tensor | None]:
    return [p.grad for p in params]


def assert_bitwise_equal(a: Tensor, b: Tensor) -> None:
    """Checks bitwise equality: a NaN equals the same NaN, and -0.0 differs from 0.0."""
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(_bits(a), _bits(b)), f"{a} differs from {b}"


def assert_same_grads(ours, theirs, rtol: float | None = None) -> None:
    """Checks that gradients are equal within the rounding of one multiplication."""
    for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
        if a is None or b is None:
            assert a is b
        else:
            tolerance = 2 * scale_rtol(a.dtype) if rtol is None else rtol
            torch.testing.assert_close(a, b, rtol=tolerance, atol=0, equal_nan=True)


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def true_power_sum(tensors: Iterable[Tensor], norm_type: float = 2.0) -> float:
    """The sum of |x|^p over the finite elements in float64; for the inf-norm, the largest |x|."""
    sums = [0.0]
    for t in tensors:
        x = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        x = x.double().abs()
        x = x[x.isfinite()]
        if norm_type == math.inf:
            sums.append(x.max().item() if x.numel() else 0.0)
        else:
            sums.append(x.pow(norm_type).sum().item())
    return max(sums) if norm_type == math.inf else sum(sums)


def true_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> float:
    """The norm of the finite elements in float64."""
    power_sum = true_power_sum(tensors, norm_type)
    return power_sum if norm_type == math.inf else power_sum ** (1.0 / norm_type)
