"""Stage 2, reduce: every rank comes to know what all ranks know together.

One SUM collective over one small float64 vector (power sums, counts of non-finite elements,
losses), and one MAX for an inf-norm. With `group=None` and plain tensors there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.measure import GradStats


@dataclass(frozen=True, slots=True)
class Signals:
    """What a step knows besides its gradients. All tensors live where the stats do.

    Attributes:
        losses: float64 `(L,)`: the losses of this step, means over micro-batches.
        loss_names: Their L names.
        inv_scale: float64 `()`, what gradients are still to be multiplied by; None if nothing is.
        found_inf: float32 `()`, > 0 if a loss scaler found non-finite gradients on any device; None
            without a scaler.
    """

    losses: Tensor
    loss_names: Sequence[str] = ()
    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @staticmethod
    def none(device: torch.device) -> Signals:
        """No losses, no scaler."""
        return Signals(torch.empty(0, dtype=torch.float64, device=device))


def reduce(stats: GradStats, signals: Signals, group: None = None) -> tuple[GradStats, Signals]:
    """Joins the stats and signals of all ranks; the same result on every rank.

    Args:
        stats: What this rank measured.
        signals: What this rank knows.
        group: None: this process holds the whole model.

    Raises:
        TypeError: `group` is of another kind.
    """
    check_group(group)
    return stats, signals


def check_group(group: object) -> None:
    """Raises a TypeError for what is no group."""
    if group is not None:
        raise TypeError(
            f"group={group!r}: only group=None, one process, is supported in this release"
        )
