"""Elementwise operations on gradients, independent of their norm: clamps and replacements.

Memory traffic: reads and writes every gradient (2N bytes).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastguard.gradients.buckets import FLOATING, GradBuckets
from fastguard.gradients.vectors import in_pieces

LARGEST = {dtype: torch.finfo(dtype).max for dtype in FLOATING}


def check_real(grads: Iterable[Tensor]) -> None:
    """Raises a TypeError for gradients that cannot be clamped."""
    if any(grad.is_complex() for grad in grads):
        raise TypeError(
            "a gradient is complex, and complex numbers cannot be clamped; "
            "use max_norm instead of clip_value"
        )


def clamp_finite_(grads: Sequence[Tensor], limit: float, inv_scale: Tensor | None = None) -> None:
    """Clamps finite elements to [-limit, limit] in place; NaN and Inf remain to be detected.

    Args:
        grads: Real gradients of any dtype and device.
        limit: The largest magnitude of an unscaled element.
        inv_scale: `()`, the factor that the gradients will be multiplied by. Default: None.
    """
    for grad in grads:
        if inv_scale is not None:
            bound = limit / inv_scale.to(device=grad.device, dtype=torch.float32)
            clamped = grad.clamp(-bound, bound)
        elif limit < LARGEST[grad.dtype]:  # otherwise, no finite element exceeds the limit
            clamped = grad.clamp(-limit, limit)
        else:
            continue
        grad.copy_(torch.where(grad.isinf(), grad, clamped))


def clamp_(buckets: GradBuckets, limit: float) -> None:
    """Clamps all elements to [-limit, limit] in place; NaN stays.

    If the limit is beyond the range of the dtype, nothing is clamped, and Inf stays.
    """
    for bucket in buckets.buckets:
        if limit <= LARGEST[bucket.dtype]:
            for grad in in_pieces(bucket.grads):
                grad.clamp_(-limit, limit)
            bucket.write_back()


def check_fill(buckets: GradBuckets, fill: Mapping[str, float]) -> None:
    """Raises a ValueError if a gradient cannot represent a replacement for NaN or Inf."""
    for bucket in buckets.buckets:
        largest = LARGEST[bucket.dtype]
        for name, value in fill.items():
            if abs(value) > largest:
                raise ValueError(
                    f"{name}={value!r} is infinite in {bucket.dtype}; use at most {largest}"
                )


def fill_nonfinite_(buckets: GradBuckets, fill: Mapping[str, float]) -> None:
    """Replaces NaN and Inf in place.

    Args:
        buckets: The gradients.
        fill: The arguments of `torch.nan_to_num`: `nan`, `posinf` and `neginf`.
    """
    for bucket in buckets.buckets:
        for grad in in_pieces(bucket.grads):
            grad.nan_to_num_(**fill)
        bucket.write_back()
