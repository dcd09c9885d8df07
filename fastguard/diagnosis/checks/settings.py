"""Checks settings that can ruin a run at any learning rate: eps, weight decay and momentum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding, Severity, percent
from fastguard.errors import several

CHECK = Family("optimizer")

SHRINK = 1e-2  # share of the weights removed per step; AdamW usually removes 1e-3 * 1e-2 = 1e-5
SHRINK_OF_LARGE = 1e-3  # limit for a weight decay of LARGE_DECAY or more, as for SHRINK
LARGE_DECAY = 10.0  # no published recipe has a larger weight decay
DECAY_OVER_GRADIENT = 10.0
MATTERING_DECAY = 0.1  # smallest coupled decay that is checked; 1e-4 to 1e-2 is usual
MOMENTUM = 0.995  # averages over 200 steps; 0.9 to 0.99 is usual
BETA1, BETA2 = 0.995, 0.99999


def check_settings(evidence: Evidence) -> Iterator[Finding]:
    """Checks every param group; if eps is 0, also what a real step does."""
    optimizer = evidence.subject.optimizer
    for i, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        where = f"param group {i}"
        yield from _eps(evidence, group, where)
        yield from _weight_decay(evidence, group, where)
        yield from _momentum(group, where)


def _number(group: dict[str, Any], name: str) -> float:
    """Returns a setting as a number, or NaN.

    Synchronizes if the setting is a tensor on a GPU.
    """
    value = group.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float | torch.Tensor):
        return math.nan
    return float(value)


# The eps in the denominator.


def _eps(evidence: Evidence, group: dict[str, Any], where: str) -> Iterator[Finding]:
    eps = _number(group, "eps")
    # Some kernels, such as torch's fused ones, compute in float32 for any dtype.
    names = {p: name for name, p in evidence.trained.items()}
    held = {names[p]: p for p in group["params"] if p in names}
    zero = [n for n, p in held.items() if float(torch.tensor(eps, dtype=p.dtype)) == 0.0]
    if not zero:
        return
    updates = {} if evidence.no_steps_reason else evidence.real_steps.updates
    destroyed = [n for n in zero if n in updates and not math.isfinite(updates[n].moved)]
    kind = type(evidence.subject.optimizer)
    in_dtype = kind.__module__.startswith("torch.optim") and not group.get("fused")
    if not destroyed and not in_dtype:
        return
    dtype = held[(destroyed or zero)[0]].dtype
    name = str(dtype).removeprefix("torch.")
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    what = f"eps={eps:g} is 0 in {name}, whose smallest number is {smallest:.2g}"
    what = what if eps else "eps is 0"
    done = f"; this happened in the first step to {several(destroyed)}" if destroyed else ""
    yield Finding(
        CHECK,
        "eps-vanished",
        "error" if destroyed else "warning",
        f"{what}: where the gradient or its square is 0, the update is 0/0 or Inf{done}",
        where=where,
        value=eps,
        limit=smallest,
        remedy="keep the weights in float32 and compute in 16 bits under torch.autocast. "
        "Alternatively, use bfloat16 weights, or fused=True, which computes in float32, or an "
        "eps that float16 can represent, such as 1e-4."
        if eps and dtype.itemsize == 2
        else "use the optimizer's default eps, 1e-8.",
    )


# Weight decay.


def _weight_decay(evidence: Evidence, group: dict[str, Any], where: str) -> Iterator[Finding]:
    decay = _number(group, "weight_decay")
    if not decay or math.isnan(decay):
        return
    peak = [_number(group, name) for name in ("lr", "initial_lr")]
    lr = max((lr for lr in peak if not math.isnan(lr)), default=math.nan)
    if decay < 0:
        grows = f"weight decay {decay:g} is negative: it makes the weights grow without bound"
        yield _decay(where, "error", grows, decay, 0.0)
    elif _is_adaptive(group) and not _is_decoupled(evidence, group):
        yield from _coupled_decay(evidence, group, where, decay)
    elif not math.isnan(lr) and not (_is_adaptive(group) and decay <= MATTERING_DECAY):
        yield from _decoupled_decay(group, where, decay, lr)


def _decoupled_decay(
    group: dict[str, Any], where: str, decay: float, lr: float
) -> Iterator[Finding]:
    """Checks decay that removes `lr * decay` of the weights per step."""
    momentum = _number(group, "momentum")
    # In SGD, momentum accumulates the decay, which multiplies its effect.
    times = 1 / (1 - momentum) if 0 < momentum < 1 and "dampening" in group else 1.0
    shrink = lr * decay * times
    product = f"lr * weight_decay = {lr:g} * {decay:g} = {lr * decay:.3g}"
    product += f", times {times:.3g} through momentum {momentum:g}" if times > 1 else ""
    if lr * decay >= 1:
        what = f"{product}: every step removes all of the weights or more, whatever the gradient"
        yield _decay(where, "error", what, lr * decay, 1.0)
    elif shrink > SHRINK or (decay >= LARGE_DECAY and shrink > SHRINK_OF_LARGE):
        steps = math.log(2) / shrink
        what = (
            f"{product}: decay alone removes {percent(min(shrink, 1.0))} of the weights per step"
            f" and halves them every {max(steps, 1):.3g} steps"
        )
        yield _decay(where, "warning", what, shrink, SHRINK)
    elif decay >= LARGE_DECAY:
        what = f"weight decay {decay:g} is far above the usual 0.01 to 0.1; {product}"
        yield _decay(where, "note", what, decay, LARGE_DECAY)


def _coupled_decay(
    evidence: Evidence, group: dict[str, Any], where: str, decay: float
) -> Iterator[Finding]:
    """Checks decay that is added to the gradient and then scaled with it."""
    names = {p: name for name, p in evidence.trained.items()}
    known = [names[p] for p in group["params"] if names.get(p) in evidence.gradients]
    gradient = math.hypot(*(_norm(evidence, n) for n in known), 0.0)
    weights = math.hypot(*(float(evidence.trained[n].detach().double().norm()) for n in known), 0.0)
    measured = gradient > 0 and not evidence.step.from_output and math.isfinite(gradient)
    ratio = decay * weights / gradient if measured else math.nan
    if decay < MATTERING_DECAY or not (ratio > DECAY_OVER_GRADIENT or decay >= LARGE_DECAY):
        return
    relative = f", {ratio:.3g} times the gradient of the loss" if measured else ""
    what = (
        f"weight decay {decay:g} adds {decay:g} times the weights to the gradient{relative}; this "
        "optimizer rescales the sum, so the decay dominates the step"
    )
    yield _decay(where, "warning", what, ratio if measured else decay, DECAY_OVER_GRADIENT)


def _norm(evidence: Evidence, name: str) -> float:
    values = evidence.gradients[name]
    return values.rms * math.sqrt(values.numel)


def _is_adaptive(group: dict[str, Any]) -> bool:
    """Whether the optimizer divides by the size of the gradient, judged by the group's keys."""
    is_asgd = "t0" in group
    return not is_asgd and any(
        name in group for name in ("betas", "alpha", "rho", "lr_decay", "beta2_decay")
    )


def _is_decoupled(evidence: Evidence, group: dict[str, Any]) -> bool:
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    kind = type(evidence.subject.optimizer)
    coupled = ("RMSprop", "Adagrad", "Adamax", "Adadelta", "Adam", "NAdam", "RAdam", "ASGD")
    return not (kind.__module__.startswith("torch.optim") and kind.__name__ in coupled)


def _decay(where: str, severity: Severity, seen: str, value: float, limit: float) -> Finding:
    return Finding(
        CHECK,
        "weight-decay",
        severity,
        seen,
        where=where,
        value=value,
        limit=limit,
        remedy="lower weight_decay: 0.01 to 0.1 for AdamW, 1e-5 to 1e-3 for optimizers that add "
        "it to the gradient (SGD, Adam, RMSprop). A large learning rate multiplies its effect.",
    )


# Running averages.


def _momentum(group: dict[str, Any], where: str) -> Iterator[Finding]:
    for name in ("momentum", "alpha", "rho"):
        value = _number(group, name)
        if name != "momentum" and "t0" in group:  # ASGD's `alpha` is not a decay rate
            continue
        undamped = name == "momentum" and not _number(group, "dampening") > 0
        if value >= 1 or value < 0 or (name == "momentum" and value > MOMENTUM):
            yield _average(where, name, value, undamped)
    betas = group.get("betas")
    if not isinstance(betas, list | tuple) or len(betas) < 2:
        return
    one, two = float(betas[0]), float(betas[1])
    if not (0 <= one < 1 and 0 <= two < 1):
        bad = "betas[0]" if not 0 <= one < 1 else "betas[1]"
        yield _average(where, bad, one if bad == "betas[0]" else two, False)
        return
    seen = _odd_betas(group, one, two)
    if seen:
        yield CHECK.warning(
            "momentum",
            f"betas=({one:g}, {two:g}): {seen}",
            where=where,
            value=two if one <= BETA1 else one,
            limit=one * one if one <= BETA1 else BETA1,
            remedy="the default is betas=(0.9, 0.999); (0.9, 0.95) is usual for large language "
            "models, (0, 0.99) or (0.5, 0.999) for GANs.",
        )


def _odd_betas(group: dict[str, Any], one: float, two: float) -> str:
    if one > BETA1:
        swapped = "; the two betas look swapped" if two < one else ""
        return f"the first beta averages the gradient over {1 / (1 - one):.3g} steps{swapped}"
    if "eps" in group and one * one > two > 0:  # Lion, which has no eps, has no second moment
        return (
            "the second moment decays faster than the first, so after a large gradient the "
            "denominator becomes small while the numerator is still large"
        )
    if two > BETA2:
        steps = f"{1 / (1 - two):.3g}"
        return f"the second moment averages over {steps} steps and does not follow the gradients"
    return ""


def _average(where: str, name: str, value: float, undamped: bool) -> Finding:
    outside = not 0 <= value < 1
    if outside:
        seen = f"{name}={value:g} is outside [0, 1): the average never decays, or grows"
    else:
        times = 1 / (1 - value)
        grown = f" and multiplies the step by up to {times:.3g}" if undamped else ""
        seen = f"{name}={value:g} averages over {times:.3g} steps{grown}"
    return Finding(
        CHECK,
        "momentum",
        "error" if outside else "warning",
        seen,
        where=where,
        value=value,
        limit=1.0 if outside else MOMENTUM,
        remedy="0.9 is usual and 0.99 the maximum; for a longer average, divide the learning rate "
        "by the factor by which momentum multiplies the step.",
    )
