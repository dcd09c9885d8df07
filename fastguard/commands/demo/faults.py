"""The faults of the demo: what bad batches, bad kernels and bad memory do to a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from fastguard.ranks.dtensors import local_parts

FEWEST_STEPS = 20  # with fewer, the faults below run into each other
EARLY, LATE = "blocks.0.qkv.weight", "head.weight"
SPIKE = 1e4


class Kind(Enum):
    """What goes wrong; the value is how people call it."""

    SPIKE = "gradient × 10,000"
    INF_GRAD = "Inf in early layer"
    NAN_LOSS = "NaN loss"
    NAN_GRAD = "NaN in late layer"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        step: When, counted from 1.
        kind: What.
        in_burst: Whether it is one of several in a row.
    """

    step: int
    kind: Kind
    in_burst: bool = False

    def spoil_loss(self, loss: Tensor) -> Tensor:
        """The loss to go backward from."""
        return loss * math.nan if self.kind is Kind.NAN_LOSS else loss

    @torch.no_grad()
    def spoil_gradients(self, model: nn.Module, strikes_here: bool = True) -> None:
        """Changes the gradients in place: one element, where it strikes, or all of them."""
        if self.kind is Kind.SPIKE:
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(SPIKE)
        elif not strikes_here:
            return
        elif self.kind is Kind.INF_GRAD:
            _gradient(model, EARLY)[0] = math.inf
        elif self.kind is Kind.NAN_GRAD:
            _gradient(model, LATE)[-1] = math.nan


def plan(steps: int) -> tuple[Fault, ...]:
    """The faults of a run of `steps` steps.

    The spike comes first because it is the only one that bare PyTorch lives through; the burst
    comes last, when a run has most to lose.
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
    """The gradient of a parameter by name, flat; of shards, what this process has."""
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return local_parts([gradient])[0].view(-1)
