"""What a `GradScaler` hands to the optimizer that it steps, and what it learns back from all ranks.

`GradScaler.step` hands over the number that it found, and its scale unless the gradients have been
unscaled before, but not itself. So the scaler is looked up where it is bound to be, in the frame
that called `step`, for two reasons:

* The scale tells whether an overflow is the scaler's own business. It lowers its scale after each,
  which is all that a healthy run needs until the scale is at its floor.
* A scaler looks at the gradients of its own rank. Where one rank alone holds the Inf (a pipeline
  stage), it alone would halve its scale, and from then on the ranks would add gradients of
  different scales.

That costs a few microseconds, and only in steps that a scaler takes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fastguard.gradients.transfer import moved, numbers_on
from fastguard.records.advice import LONGEST_SEARCH
from fastguard.stages.contract import Signals

FLOOR = 1.0
"""A scale below makes gradients smaller: no overflow in fp16 is cured by that."""

_FLOORS = ("min_scale", "_min_scale", "min_loss_scale", "_min_loss_scale")
_NEAREST = 32  # frames between GradScaler.step and ours: hooks, profiler, a scheduler's counter


class HandedOver(NamedTuple):
    """What a scaler gave the optimizer for one step; nothing but None without one.

    Attributes:
        inv_scale, found_inf, scale_falls: As in `Signals`.
        scaler: The scaler itself, if it was found.
    """

    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None
    scale_falls: Tensor | None = None
    scaler: GradScaler | None = None

    def signals(self, losses: Tensor, loss_names: Sequence[str]) -> Signals:
        """All that a step knows besides its gradients."""
        return Signals(
            losses, loss_names, self.inv_scale, self.found_inf, scale_falls=self.scale_falls
        )


_NOTHING = HandedOver()


def handed_over(optimizer: Optimizer, device: torch.device) -> HandedOver:
    """What a scaler left on the optimizer, on `device`. Waits for nothing."""
    handed_scale = getattr(optimizer, "grad_scale", None)  # None after GradScaler.unscale_
    found = getattr(optimizer, "found_inf", None)
    if handed_scale is None and found is None:
        return _NOTHING
    inv_scale = found_inf = falls = scaler = None
    if handed_scale is not None:
        inv_scale = moved(handed_scale.double(), device).reshape(()).reciprocal()
    if found is not None:
        if not isinstance(found, Tensor):  # the number 0 where a rank had no gradient to look at
            found = numbers_on((float(found),), device, torch.float32)
        found_inf = moved(found, device).reshape(())
        scaler = _stepping(optimizer)
        scale = scaler._scale if scaler is not None else handed_scale
        if scale is not None:
            falls = moved(scale > floor_of(scaler), device).reshape(())  # NaN does not
    return HandedOver(inv_scale, found_inf, falls, scaler)


def longest_search(scaler: torch.amp.GradScaler) -> int:
    """Steps in a row in which a scaler may lower its scale before it is at its floor."""
    factor = getattr(scaler, "_backoff_factor", 0.5)
    if not (isinstance(factor, float) and 0.5 < factor < 1.0):
        return LONGEST_SEARCH
    return math.ceil(LONGEST_SEARCH * math.log(0.5) / math.log(factor))


def floor_of(scaler: object) -> float:
    """The scale below which a scaler does not go, or should not: what it says itself, else 1."""
    for name in _FLOORS:
        said = getattr(scaler, name, None)
        if isinstance(said, Real) and not isinstance(said, bool):
            return float(said)
    return FLOOR


def tell_scaler(scaler: GradScaler | None, optimizer: Optimizer, found_inf: Tensor | None) -> None:
    """Replaces what the scaler that steps this optimizer found by what all ranks found.

    Args:
        scaler: The scaler.
        optimizer: What `GradScaler.step` was called with.
        found_inf: float32 `()`, 1 if the scaler of any rank found something non-finite, else 0.
    """
    if scaler is None or scaler._scale is None or found_inf is None:
        return
    found = found_inf.to(scaler._scale.device, copy=True)  # the scaler adds to it
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {found.device: found}


@contextmanager
def lower_scales_stay(objects: Iterable[Any]) -> Iterator[None]:
    """Inside, objects may load an older state; a scale that is lower now stays. Waits for nothing.

    Args:
        objects: Scalers, or what keeps one as an attribute; all else is left alone.
    """
    before = [
        (scaler, scaler._init_scale if scaler._scale is None else scaler._scale.clone())
        for scaler in _scalers_of(objects)
    ]
    yield
    for scaler, scale in before:
        if scaler._scale is None:  # it has not scaled anything yet
            scaler._init_scale = min(scaler._init_scale, float(scale))
            continue
        now = scaler._scale
        scale = torch.as_tensor(scale, dtype=now.dtype, device=now.device)
        lower = (scale > 0) & (scale < now)  # 0 is no scale to go on with
        now.copy_(torch.where(lower, scale, now))


def _scalers_of(objects: Iterable[Any]) -> list[GradScaler]:
    found: dict[int, GradScaler] = {}
    for thing in objects:
        for candidate in (thing, *getattr(thing, "__dict__", {}).values()):
            if isinstance(candidate, GradScaler) and candidate.is_enabled():
                found[id(candidate)] = candidate
    return list(found.values())


def _stepping(optimizer: Optimizer) -> GradScaler | None:
    """The scaler whose `step` runs now, with this optimizer."""
    frame = sys._getframe(1)
    for _ in range(_NEAREST):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        if frame.f_code.co_name != "step":
            continue
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, GradScaler):
            return scaler if id(optimizer) in scaler._per_optimizer_states else None
    return None
