"""The faults that the demo injects into losses and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from fastguard.ranks.dtensors import local_parts

MIN_STEPS = 20  # with fewer steps, the faults overlap
EARLY, LATE = "blocks.0.qkv.weight", "head.weight"  # parameters whose gradients get Inf, NaN
SPIKE = 1e4  # factor


class Kind(Enum):
    """Kinds of faults; the values are their labels."""

    SPIKE = "gradient × 10,000"
    INF_GRAD = "Inf in early layer"
    NAN_LOSS = "NaN loss"
    NAN_GRAD = "NaN in late layer"


@dataclass(frozen=True, slots=True)
class Fault:
    """One injected fault.

    Attributes:
        step: Step at which it occurs, from 1.
        kind: Kind of fault.
        in_burst: Whether it is one of several consecutive faults.
    """

    step: int
    kind: Kind
    in_burst: bool = False

    def corrupt_loss(self, loss: Tensor) -> Tensor:
        """Returns the loss, multiplied by NaN if this fault affects the loss."""
        return loss * math.nan if self.kind is Kind.NAN_LOSS else loss

    @torch.no_grad()
    def corrupt_gradients(self, model: nn.Module, on_this_rank: bool = True) -> None:
        """Corrupts gradients in place.

        A spike scales all gradients on every rank. All other faults change one element, and only if
        `on_this_rank` is True.
        """
        if self.kind is Kind.SPIKE:
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(SPIKE)
        elif not on_this_rank:
            return
        elif self.kind is Kind.INF_GRAD:
            _gradient(model, EARLY)[0] = math.inf
        elif self.kind is Kind.NAN_GRAD:
            _gradient(model, LATE)[-1] = math.nan


def plan(steps: int) -> tuple[Fault, ...]:
    """Plans the faults of a run of `steps` steps.

    The spike comes first because it is the only fault that bare PyTorch survives. The burst comes
    last, when most training would be lost.
    """
    burst = (Kind.INF_GRAD, Kind.NAN_GRAD, Kind.SPIKE, Kind.NAN_LOSS)
    return (
        Fault(round(0.25 * steps), Kind.SPIKE),
        Fault(round(0.40 * steps), Kind.INF_GRAD),
        Fault(round(0.55 * steps), Kind.NAN_LOSS),
        Fault(round(0.70 * steps), Kind.NAN_GRAD),
        *(Fault(round(0.85 * steps) + i, kind, in_burst=True) for i, kind in enumerate(burst)),
    )


def _gradient(model: nn.Module, name: str) -> Tensor:
    """The flat gradient of a named parameter; for sharded parameters, the local shard."""
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return local_parts([gradient])[0].view(-1)
