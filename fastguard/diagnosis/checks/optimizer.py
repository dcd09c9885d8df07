"""Checks that the optimizer holds the model's parameters and changes them by a usual amount."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from fastguard.diagnosis.checks.settings import check_settings
from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding, percent
from fastguard.errors import several
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.model_buffers import are_protected

CHECK = Family("optimizer")

_UNLESS = ", unless another optimizer trains them (as in a GAN)"
VANISHED_LR = 1e-12  # in float32, a smaller rate cannot change any weight above 1e-5
UPDATE_HIGH = 0.1  # relative to the weights' norm; 1e-3 is usual
UPDATE_LOW = 1e-8  # relative to the weights' norm; less than the spacing of float32 numbers


def check(evidence: Evidence) -> Iterator[Finding]:
    """Checks the param groups, and what one real step does."""
    evidence = evidence.repaired
    optimizer = evidence.subject.optimizer
    if optimizer is None:
        yield CHECK.note("not-checked", "no optimizer was given", remedy="pass optimizer=.")
        return
    yield from _members(evidence, optimizer)
    for i, group in enumerate(optimizer.param_groups):
        yield from _learning_rate(optimizer, group, f"param group {i}")
        yield from _decayed_norms(evidence, group, f"param group {i}")
        yield from _eps(evidence, group, f"param group {i}")
    yield from check_settings(evidence)
    yield from _buffers(evidence)
    yield from _updates(evidence, optimizer)


def _members(evidence: Evidence, optimizer: Optimizer) -> Iterator[Finding]:
    parameters = evidence.subject.parameters
    held = {p for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if trainable and not held & set(parameters.values()):
        yield CHECK.error(
            "foreign-optimizer",
            "the optimizer holds none of the model's parameters, so it trains another model",
            value=len(trainable),
            limit=0,
            remedy="create the optimizer after the model is complete, that is, after replacing "
            "layers, and after loading, deep-copying or moving the model.",
        )
        return
    left_out = [name for name, p in trainable.items() if p not in held]
    if left_out:
        # Parameters without a gradient in this step belong to another optimizer with its own step.
        reached = evidence.step.gradients is None or any(n in evidence.gradients for n in left_out)
        yield Finding(
            CHECK,
            "not-optimized",
            "warning" if reached else "note",
            f"{len(left_out)} of {len(trainable)} trainable parameters are in no param group and "
            f"will not learn{_UNLESS}: {several(left_out)}",
            where=left_out[0],
            value=len(left_out) / len(trainable),
            limit=0,
            remedy="add these parameters to the optimizer, or set requires_grad_(False) if they "
            "should not be trained.",
        )
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if frozen:
        inside = sum(parameters[name] in held for name in frozen)
        yield CHECK.note(
            "frozen",
            f"{len(frozen)} of {len(parameters)} parameters are frozen, {inside} of them in a "
            f"param group: {several(frozen)}",
            where=frozen[0],
            value=len(frozen) / len(parameters),
        )


def _buffers(evidence: Evidence) -> Iterator[Finding]:
    """Finds buffers that a bad batch changes even though its step is skipped."""
    guard = evidence.subject.guard
    if not isinstance(guard, GuardedOptimizer) or are_protected(guard):
        return
    changing = [
        name
        for module, name in evidence.subject.modules.items()
        if module._buffers.get("running_mean") is not None
    ]
    if changing:
        yield CHECK.note(
            "unprotected-buffers",
            "a batch with NaN makes these running statistics NaN even if its step is skipped: "
            f"{several(changing)}",
            where=changing[0],
            value=len(changing),
            limit=0,
            remedy="call fastguard.protect_buffers(model, optimizer), which restores these "
            "buffers when a step is skipped; the trainer integrations call it already.",
        )


def _learning_rate(optimizer: Optimizer, group: dict[str, Any], where: str) -> Iterator[Finding]:
    # synchronizes if `lr` is a tensor on a GPU
    lr = float(group["lr"]) if "lr" in group else math.nan
    if (math.isnan(lr) and "lr" not in group) or lr >= VANISHED_LR:
        return
    peak = group.get("initial_lr")
    # A warm-up that starts at 0, before its first step.
    warms_up = lr == 0 and peak is not None and float(peak) > 0 and not optimizer.state
    scheduled = f"; its schedule started at {float(peak):.3g}" if peak is not None else ""
    yield Finding(
        CHECK,
        "lr-vanished",
        "warning" if warms_up else "error",
        f"the learning rate is {lr:.3g}, so no weight changes{scheduled}",
        where=where,
        value=lr,
        limit=VANISHED_LR,
        remedy="this is fine only if a warm-up begins at this step; take one step and check again."
        if warms_up
        else "restart the schedule, step the scheduler once per epoch or per step as planned, and "
        "set a minimum with fastguard.GuardedLR(scheduler, floor=1e-6).",
    )


def _decayed_norms(evidence: Evidence, group: dict[str, Any], where: str) -> Iterator[Finding]:
    decay = float(group.get("weight_decay") or 0)
    if decay == 0:
        return
    names = {p: name for name, p in evidence.subject.parameters.items()}
    decayed = [names[p] for p in group["params"] if p in names and p.ndim < 2 and p.requires_grad]
    if decayed:
        yield CHECK.note(
            "decayed-norms",
            f"weight decay {decay:g} also applies to {len(decayed)} biases and scales of "
            f"normalization layers: "
            f"{several(decayed)}",
            where=where,
            value=len(decayed),
            limit=0,
            remedy="put parameters with fewer than two dimensions into a group with "
            "weight_decay=0.",
        )


def _eps(evidence: Evidence, group: dict[str, Any], where: str) -> Iterator[Finding]:
    eps = group.get("eps")
    if eps is None or "betas" not in group or evidence.step.from_output:
        return
    names = {p: name for name, p in evidence.subject.parameters.items()}
    known = [names[p] for p in group["params"] if p in names]
    sizes = {n: evidence.gradients[n] for n in known if n in evidence.gradients}
    below = [n for n, values in sizes.items() if 0 < values.rms < float(eps)]
    # The gradient of a bias before a batch norm consists of rounding errors only.
    if sum(sizes[n].numel for n in below) <= 0.5 * sum(v.numel for v in sizes.values()):
        return
    rms = max(sizes[n].rms for n in below)
    yield CHECK.warning(
        "eps-dominates",
        f"gradients with rms {rms:.3g} or less are smaller than eps {float(eps):g}, so eps makes "
        f"the step smaller: {several(below)}",
        where=where,
        value=rms,
        limit=float(eps),
        remedy="lower eps, for example to 1e-12, or scale the loss up.",
    )


def _updates(evidence: Evidence, optimizer: Optimizer) -> Iterator[Finding]:
    if evidence.no_steps_reason:
        return
    updates = evidence.real_steps.updates
    names = {p: name for name, p in evidence.subject.parameters.items()}
    for i, group in enumerate(optimizer.param_groups):
        found = [updates[names[p]] for p in group["params"] if names.get(p) in updates]
        weight = math.hypot(*(u.weight for u in found), 0.0)
        moved = math.hypot(*(u.moved for u in found), 0.0)
        if not weight or UPDATE_LOW <= moved / weight <= UPDATE_HIGH or not math.isfinite(moved):
            continue
        if float(group.get("lr", 1.0)) < VANISHED_LR:
            continue  # another finding reports a rate of 0
        ratio = moved / weight
        large = ratio > UPDATE_HIGH
        yield CHECK.warning(
            "large-update" if large else "small-update",
            f"one step changes the weights by {percent(ratio)} of their norm",
            where=f"param group {i}",
            value=ratio,
            limit=UPDATE_HIGH if large else UPDATE_LOW,
            remedy="lower the learning rate, add a warm-up, and clip the gradient norm."
            if large
            else "raise the learning rate; if the gradients are the reason, scale the loss up.",
        )
