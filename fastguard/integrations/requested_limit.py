"""Moves a framework's clipping into the guard's next step.

Frameworks first clip and then step, and clipping in both places would scale gradients twice. The
clipping call of a framework therefore only stores its limit here, so that gradients are read and
scaled once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastguard.functional.clip import limit_of
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.stages.contract import Verdict
from fastguard.stages.measure import norm_type_of
from fastguard.stages.reason import Reason


class RequestedLimit:
    """The limits that a framework requests from a guarded optimizer, each for one step.

    Args:
        optimizer: The optimizer; its `max_norm` applies to steps without a request.
        fixed: Whether the user gave the guard its own `max_norm`, which then takes precedence over
            requested norms. Requested values apply in any case.
    """

    def __init__(self, optimizer: GuardedOptimizer, *, fixed: bool) -> None:
        self.optimizer = optimizer
        self.fixed = fixed
        self._own = optimizer.max_norm
        self._valued: list[dict[str, Any]] = []
        optimizer.register_step_post_hook(self._reset)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # also called for copies, since copies of optimizers have no hooks
        self.optimizer.register_step_post_hook(self._reset)

    def request_norm(self, max_norm: float, norm_type: float = 2.0) -> None:
        """Clips the next step to this norm, unless the limit is fixed.

        Raises:
            ValueError: The guard uses another norm type, or the limit is invalid.
        """
        if norm_type_of(norm_type) != self.optimizer.norm_type:
            raise ValueError(
                f"cannot clip with norm_type={norm_type}, because the guard measures norm_type="
                f"{self.optimizer.norm_type:g}; pass norm_type={norm_type} to the guard"
            )
        limit = limit_of("max_norm", max_norm, quiet=True)
        if not self.fixed:
            self.optimizer.max_norm = limit

    def request_value(self, clip_value: float) -> None:
        """Clamps the elements in the next step, except in param groups with their own `clip_value`.

        Unlike in torch, Inf stays Inf and is detected.
        """
        limit = limit_of("clip_value", clip_value)
        for group in self.optimizer.param_groups:
            if "clip_value" not in group:
                self._valued.append(group)
                group["clip_value"] = limit

    def _reset(self, *_: Any) -> None:
        self.optimizer.max_norm = self._own
        for group in self._valued:
            group.pop("clip_value", None)
        self._valued.clear()


def total_norm_of(verdict: Verdict) -> Tensor:
    """Returns the norm that torch would report: NaN if non-finite elements remained. Never syncs.

    In contrast, records contain the norm of the finite elements, and counts of non-finite elements.
    """
    found = (verdict.reason == int(Reason.NONFINITE_GRAD)) | (
        verdict.reason == int(Reason.LOSS_SCALE)
    )
    nonfinite = found & (verdict.clean == 0)
    return torch.where(nonfinite, math.nan, verdict.total_norm)


def was_skipped(optimizer: GuardedOptimizer) -> bool:
    """Whether the last step was skipped. Synchronizes with the GPU."""
    return optimizer.last is not None and bool(optimizer.last.found_inf.item() == 1.0)
