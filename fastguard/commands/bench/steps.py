"""Whole optimizer steps, guarded in every usual way, around the same inner optimizer.

All contenders of a case step the same parameters, so that no contender profits from its memory
layout. Flat contenders own their memory and therefore step a copy of the parameters. The learning
rate is tiny: the arithmetic is the same, but the weights hardly change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastguard
from fastguard.commands.bench.contenders import Prepared, Unavailable, grad_scaler, torch_clip
from fastguard.commands.bench.workload import Workload

LR = 1e-12
FLAT_PARAMETERS = "GuardedOptimizer flat parameters"
TRUSTED_PARAMETERS = f"{FLAT_PARAMETERS} trusted"


def inner_optimizer(work: Workload, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimizer named by a case."""
    assert work.case.optimizer is not None
    kind, implementation = work.case.optimizer
    fused, foreach = implementation == "fused", implementation == "foreach"
    if kind == "AdamW":
        return torch.optim.AdamW(parameters, lr=LR, fused=fused, foreach=foreach)
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9, fused=fused, foreach=foreach)


def clip_and_step(
    inner: torch.optim.Optimizer, parameters: Sequence[Tensor], max_norm: float
) -> Tensor:
    """Clips and steps as in torch; returns the norm."""
    norm = torch_clip(parameters, max_norm)
    inner.step()
    return norm


def clip_and_step_if_norm_is_finite(
    inner: torch.optim.Optimizer, parameters: Sequence[Tensor], max_norm: float
) -> Tensor:
    """Clips, then steps only if the norm is finite."""
    norm = torch_clip(parameters, max_norm)
    if torch.isfinite(norm):
        inner.step()
    return norm


def clip_and_step_if_all_is_finite(
    inner: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    grads: Iterable[Tensor],
    max_norm: float,
) -> Tensor | None:
    """Checks every gradient first; returns None if the step was skipped."""
    if not all(torch.isfinite(g).all() for g in grads):
        return None
    return clip_and_step(inner, parameters, max_norm)


def bare_step(work: Workload, inner: torch.optim.Optimizer) -> Prepared:
    """No guard: the baseline cost."""
    _finite_only(work)
    return Prepared(_stepping(inner), work.restore, work.parameters)


def clip_then_step(work: Workload, inner: torch.optim.Optimizer) -> Prepared:
    """Clips without checking for NaN."""
    _finite_only(work)

    def call() -> Tensor:
        return clip_and_step(inner, work.parameters, work.max_norm)

    return Prepared(call, work.restore, work.parameters)


def clip_isfinite_norm_step(work: Workload, inner: torch.optim.Optimizer) -> Prepared:
    """The shortest handwritten guard: clip, check the norm, step."""

    def call() -> Tensor:
        return clip_and_step_if_norm_is_finite(inner, work.parameters, work.max_norm)

    return Prepared(call, work.restore, work.parameters)


def isfinite_clip_step(work: Workload, inner: torch.optim.Optimizer) -> Prepared:
    """The usual handwritten guard: check every gradient, clip, step."""

    def call() -> Tensor | None:
        return clip_and_step_if_all_is_finite(inner, work.parameters, work.grads, work.max_norm)

    return Prepared(call, work.restore, work.parameters)


def grad_scaler_step(work: Workload, inner: torch.optim.Optimizer) -> Prepared:
    """A step with `torch.amp.GradScaler`."""
    scaler = grad_scaler(work.device)

    def call() -> Tensor:
        scaler.unscale_(inner)
        norm = torch_clip(work.parameters, work.max_norm)
        scaler.step(inner)
        scaler.update(1.0)  # undoes the halving of the scale after a skip
        return norm

    return Prepared(call, work.restore, work.parameters)


def guarded_step(work: Workload, inner: torch.optim.Optimizer) -> Prepared:
    """`GuardedOptimizer` with a limit."""
    guarded = fastguard.GuardedOptimizer(inner, max_norm=work.max_norm)
    return Prepared(_stepping(guarded), work.restore, work.parameters)


def guarded_step_flat(work: Workload, inner: torch.optim.Optimizer) -> Prepared:
    """`GuardedOptimizer(flat_buckets=True)`."""
    return _flat(work, flat_buckets=True)


def guarded_step_flat_parameters(work: Workload, inner: torch.optim.Optimizer) -> Prepared:
    """`GuardedOptimizer(flat_parameters=True)`."""
    return _flat(work, flat_parameters=True)


def guarded_step_trusted(work: Workload, inner: torch.optim.Optimizer) -> Prepared:
    """`GuardedOptimizer(flat_parameters="trusted")`."""
    return _flat(work, flat_parameters="trusted")


def _flat(work: Workload, **how: Any) -> Prepared:
    twin = work.twin()
    inner = inner_optimizer(work, twin)
    guarded = fastguard.GuardedOptimizer(inner, max_norm=work.max_norm, **how)
    return Prepared(_stepping(guarded), lambda: work.restore(twin), twin)


STEPS: dict[str, Callable[[Workload, torch.optim.Optimizer], Prepared]] = {
    "bare step": bare_step,
    "clip + step": clip_then_step,
    "clip + isfinite(norm) + step": clip_isfinite_norm_step,
    "isfinite + clip + step": isfinite_clip_step,
    "GradScaler + clip + step": grad_scaler_step,
    "GuardedOptimizer": guarded_step,
    "GuardedOptimizer flat": guarded_step_flat,
    FLAT_PARAMETERS: guarded_step_flat_parameters,
    TRUSTED_PARAMETERS: guarded_step_trusted,
}


def _stepping(optimizer: torch.optim.Optimizer) -> Callable[[], Tensor | None]:
    def call() -> Tensor | None:
        optimizer.step()
        last = getattr(optimizer, "last", None)
        return None if last is None else last.total_norm

    return call


def _finite_only(work: Workload) -> None:
    if work.case.situation.startswith("one NaN"):
        raise Unavailable("with this contender, a NaN would reach the weights and the state")
