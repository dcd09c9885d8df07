"""Why a step was not simply applied. Imports no torch: readers of records do without it."""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """Why a step was not simply applied; the first that holds, in this order.

    `LOSS_SCALE` stands in for `NONFINITE_GRAD` where lowering the loss scale cures the overflow.
    """

    NONE = 0
    NONFINITE_GRAD = 1
    NONFINITE_LOSS = 2
    GRAD_SPIKE = 3
    LOSS_SPIKE = 4
    LOSS_SCALE = 5

    @property
    def label(self) -> str | None:
        return self.name.lower() if self else None

    @property
    def is_incident(self) -> bool:
        """Whether the step calls for a reaction: an overflow that only lowers a loss scale is the
        scaler's own business.
        """
        return self not in (Reason.NONE, Reason.LOSS_SCALE)
