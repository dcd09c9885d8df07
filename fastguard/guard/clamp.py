"""`clip_value` of param groups: clamps gradients before the norm, and can undo it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastguard.gradients.elementwise import check_real, clamp_finite_
from fastguard.guard.clip_scope import clip_values
from fastguard.ranks.dtensors import local_parts


class Clamped:
    """Gradients that were clamped.

    Args:
        before: In raise mode, the gradients with copies of their previous values. The copies are
            needed because errors are only known after clamping: an earlier check would need a
            collective, and ranks without a `clip_value` would not join the collective.
    """

    def __init__(self, before: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self._before = before

    @staticmethod
    def of(groups: Sequence[Mapping[str, Any]], inv_scale: Tensor | None, *, keep: bool) -> Clamped:
        """Clamps the gradients of the param groups with a `clip_value`.

        Args:
            groups: `optimizer.param_groups`.
            inv_scale: float64 `()`: the factor that unscales the gradients; None: 1.
            keep: Whether to keep copies for `put_back`.
        """
        limited = clip_values(groups)
        if not limited:
            return _UNTOUCHED
        clamped = [
            (local_parts([p.grad for p in group["params"] if p.grad is not None]), limit)
            for group, limit in limited
        ]
        for grads, _ in clamped:  # checks all groups before any change
            check_real(grads)
        before = [(grad, grad.clone()) for grads, _ in clamped for grad in grads if keep]
        for grads, limit in clamped:
            clamp_finite_(grads, limit, inv_scale)
        return Clamped(before)

    def put_back(self) -> None:
        """Restores the gradients."""
        for grad, before in self._before:
            grad.copy_(before)


_UNTOUCHED = Clamped()
