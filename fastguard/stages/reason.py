"""`Reason`: why a step was not applied unchanged. Programs that read records need no torch."""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """Why a step was not applied unchanged; the first of these reasons if several hold.

    `LOSS_SCALE` replaces `NONFINITE_GRAD` if lowering the loss scale fixes the overflow.
    """

    NONE = 0
    NONFINITE_GRAD = 1
    NONFINITE_LOSS = 2
    GRAD_SPIKE = 3
    LOSS_SPIKE = 4
    LOSS_SCALE = 5

    @property
    def label(self) -> str | None:
        """The name in records, in lower case; None for `NONE`."""
        return self.name.lower() if self else None

    @property
    def is_incident(self) -> bool:
        """Whether the step was faulty. False for `LOSS_SCALE`, which the scaler handles itself."""
        return self not in (Reason.NONE, Reason.LOSS_SCALE)
