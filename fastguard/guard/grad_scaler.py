"""Reads what a `GradScaler` sets on the optimizer, and returns the `found_inf` of all ranks to it.

`GradScaler.step` sets `found_inf` on the optimizer, and also `grad_scale` unless the gradients have
been unscaled before. It sets no reference to the scaler. This module therefore looks up the scaler
in the frame that called `step`, for two reasons:

* The scale tells whether the scaler handles an overflow by itself. The scaler lowers the scale
  after each overflow, which suffices until the scale is at its minimum.
* A scaler checks only the gradients of its own rank. If only one rank (a pipeline stage) has an
  Inf, only that rank would lower its scale, and afterward the ranks would combine gradients with
  different scales.

The lookup takes a few microseconds, and happens only in steps that a scaler takes.
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
"""Default for the minimum scale: below 1, a scale makes gradients smaller than without scaling."""

_FLOORS = ("min_scale", "_min_scale", "min_loss_scale", "_min_loss_scale")
_MAX_FRAMES = 32  # maximum number of frames up to GradScaler.step: hooks, profiler, schedulers


class ScalerInputs(NamedTuple):
    """The inputs of one step from a loss scaler; all None without a scaler.

    Attributes:
        inv_scale, found_inf, scale_falls: As in `Signals`.
        scaler: The scaler, if it was found.
    """

    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None
    scale_falls: Tensor | None = None
    scaler: GradScaler | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no scaler."""
        return self is _NOTHING

    def signals(self, losses: Tensor, loss_names: Sequence[str]) -> Signals:
        """Returns the signals of a step with these losses."""
        return Signals(
            losses, loss_names, self.inv_scale, self.found_inf, scale_falls=self.scale_falls
        )


_NOTHING = ScalerInputs()


def scaler_inputs(optimizer: Optimizer, device: torch.device) -> ScalerInputs:
    """Returns what a scaler has set on the optimizer, on `device`. Never waits."""
    own = optimizer.__dict__  # not getattr, which would look them up on the wrapped optimizer too
    grad_scale, found = own.get("grad_scale"), own.get("found_inf")  # None after unscale_
    if grad_scale is None and found is None:
        return _NOTHING
    inv_scale = found_inf = falls = scaler = None
    if grad_scale is not None:
        inv_scale = moved(grad_scale.double(), device).reshape(()).reciprocal()
    if found is not None:
        if not isinstance(found, Tensor):  # `found` is the number 0 if this rank has no gradients
            found = numbers_on((float(found),), device, torch.float32)
        found_inf = moved(found, device).reshape(())
        scaler = _stepping(optimizer)
        scale = scaler._scale if scaler is not None else grad_scale
        if scale is not None:
            falls = moved(_is_above(scale, floor_of(scaler)), device).reshape(())
    return ScalerInputs(inv_scale, found_inf, falls, scaler)


def longest_search(scaler: torch.amp.GradScaler) -> int:
    """Returns how many consecutive steps a scaler may need to lower its scale to a usable value."""
    factor = getattr(scaler, "_backoff_factor", 0.5)
    if not (isinstance(factor, float) and 0.5 < factor < 1.0):
        return LONGEST_SEARCH
    return math.ceil(LONGEST_SEARCH * math.log(0.5) / math.log(factor))


def floor_of(scaler: object) -> float | Tensor:
    """Returns the minimum scale of a scaler, a number or a tensor; 1 if the scaler defines none."""
    for name in _FLOORS:
        setting = getattr(scaler, name, None)
        if isinstance(setting, Real) and not isinstance(setting, bool):
            return float(setting)
        if isinstance(setting, Tensor) and setting.numel() == 1 and setting.is_floating_point():
            return setting.detach()
    return FLOOR


def _is_above(scale: Tensor, floor: float | Tensor) -> Tensor:
    """Whether a scale is above its minimum; False for NaN. Never waits."""
    if isinstance(floor, Tensor):
        floor = moved(floor, scale.device).reshape(())
    return scale > floor


def tell_scaler(scaler: GradScaler | None, optimizer: Optimizer, found_inf: Tensor | None) -> None:
    """Replaces the `found_inf` of a scaler with the result of all ranks.

    Args:
        scaler: The scaler; None: do nothing.
        optimizer: The argument of `GradScaler.step`.
        found_inf: float32 `()`: 1 if the scaler of any rank found non-finite values, else 0.
    """
    if scaler is None or scaler._scale is None or found_inf is None:
        return
    # a copy, because the scaler adds to this tensor
    found = found_inf.to(scaler._scale.device, copy=True)
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {found.device: found}


@contextmanager
def keep_lower_scales(objects: Iterable[Any]) -> Iterator[None]:
    """Context in which objects may load an older state without raising a loss scale. Never waits.

    Args:
        objects: Scalers, or objects with a scaler as attribute; others are ignored, as is None.
    """
    before = [
        (scaler, scaler._init_scale if scaler._scale is None else scaler._scale.clone())
        for scaler in _scalers_of(objects)
    ]
    yield
    for scaler, scale in before:
        if scaler._scale is None:  # a scaler that has not been used yet
            scaler._init_scale = min(scaler._init_scale, float(scale))
            continue
        now = scaler._scale
        scale = torch.as_tensor(scale, dtype=now.dtype, device=now.device)
        lower = (scale > 0) & (scale < now)  # a scale of 0 would never recover
        now.copy_(torch.where(lower, scale, now))


def _scalers_of(objects: Iterable[Any]) -> list[GradScaler]:
    found: dict[int, GradScaler] = {}
    for thing in objects:
        for candidate in (thing, *getattr(thing, "__dict__", {}).values()):
            if isinstance(candidate, GradScaler) and candidate.is_enabled():
                found[id(candidate)] = candidate
    return list(found.values())


def _stepping(optimizer: Optimizer) -> GradScaler | None:
    """Returns the scaler whose `step` is calling this optimizer, if any."""
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        if frame.f_code.co_name != "step":
            continue
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, GradScaler):
            return scaler if id(optimizer) in scaler._per_optimizer_states else None
    return None
