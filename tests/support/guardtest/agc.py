"""A float64 NumPy reference of adaptive gradient clipping, and parameters of every layout."""

import math

import numpy as np
import torch
from torch import Tensor

SHAPES = [
    (),
    (1,),
    (7,),
    (600,),
    (3, 1),
    (1, 5),
    (4, 700),  # 4 * 175, so a divisor is used in place of 512
    (3, 1031),  # a prime, so the remainder after 512 is summed separately
    (5, 3, 2, 3),
    (6, 4, 3),
    (0, 3),
    (3, 0),
    (0,),
    (2, 5000),
]


def expected(
    grad: Tensor,
    weight: Tensor,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    p: float = 2.0,
    *,
    finite_only: bool = False,
) -> np.ndarray:
    """Returns the clipped gradient in float64, by the formula of arXiv 2102.06171."""
    g, w = (t.detach().double().numpy().copy() for t in (grad, weight))
    if g.ndim < 2:
        _clip_unit(g, w, clip_factor, eps, p, finite_only)
        return g
    for i in range(len(g)):
        _clip_unit(g[i], w[i], clip_factor, eps, p, finite_only)
    return g


def _clip_unit(
    g: np.ndarray, w: np.ndarray, clip_factor: float, eps: float, p: float, finite_only: bool
) -> None:
    limit = clip_factor * max(_norm(w, p), eps)
    norm = _norm(g[np.isfinite(g)] if finite_only else g, p)
    with np.errstate(invalid="ignore"):  # Inf * 0
        if norm > limit or math.isnan(norm):
            g *= limit / norm


def _norm(x: np.ndarray, p: float) -> float:
    x = np.abs(x).ravel().astype(np.longdouble)
    if not x.size:
        return 0.0
    if p == math.inf:
        return float(x.max())
    return float((x**p).sum() ** (1 / np.longdouble(p)))


def parameters(
    dtype: torch.dtype = torch.float32, spread: float = 3.0, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Parameters of `SHAPES`, in which about half of the units are above the limit."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in SHAPES:
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        rows = (shape[0], *[1] * (len(shape) - 1)) if len(shape) > 1 else ()
        scale = torch.randn(rows, generator=generator, dtype=torch.float64).mul(spread).exp()
        p = torch.nn.Parameter(weight.to(dtype))
        p.grad = (grad * scale * 0.01).to(dtype)
        made.append(p)
    return made


RTOL = {
    torch.float64: 1e-12,
    torch.float32: 5e-7,  # a norm with an error of 1e-7, and two roundings
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
}
"""Allows for one more rounding to the dtype than in the reference."""


def assert_clipped(grads: list[Tensor], wanted: list[np.ndarray]) -> None:
    for grad, want in zip(grads, wanted, strict=True):
        rtol = RTOL[grad.dtype]
        atol = 1e-7 if grad.dtype is torch.float16 else 0  # the denormals of float16
        np.testing.assert_allclose(grad.double().numpy(), want, rtol=rtol, atol=atol)
