"""Checks 16-bit precision: overflow in float16, rounding to zero, and NaN caused by either."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding, percent
from fastguard.diagnosis.observe import FLOAT16_MAX, Observation, Values
from fastguard.errors import several

CHECK = Family("precision")

LOST_GRADIENTS = 0.1  # share of nonzero gradients that would round to 0
LOSS_DIFFERENCE = 0.05  # relative to the loss in float32
ROUNDED = 0.5  # share of elements that an update leaves unchanged


def check(evidence: Evidence) -> Iterator[Finding]:
    """Compares the step with float32, and counts float32 values out of the range of float16."""
    evidence = evidence.repaired
    yield from _to_blame(evidence)
    yield from _overflow(evidence)
    yield from _underflow(evidence)
    yield from _loss_differs(evidence)
    yield from _rounded_updates(evidence)


def _to_blame(evidence: Evidence) -> Iterator[Finding]:
    """Reports a step that is non-finite in 16 bits and finite in float32."""
    dtypes = evidence.subject.low_precision
    if not dtypes or evidence.is_finite:
        return
    report = evidence.explained
    if report is not None and report.precision is not None:
        to_blame = report.precision
    else:
        to_blame = _all_finite(evidence.step_in_float32)
    if not to_blame:
        return
    over = _beyond_float16(evidence.step_in_float32)
    largest, module = max(((v, k) for k, v in over.items()), default=(math.inf, ""))
    name = _names(dtypes)
    first = next((a.where for a in evidence.step.activations if a.values.nonfinite), "")
    reached = f"; {module} reaches {largest:.3g} in float32" if over else ""
    yield CHECK.error(
        "float16-range",
        f"the step on this batch is not finite in {name} but finite in float32, so the cause is "
        f"the range of {name}, not the model{reached}",
        where=(report.module if report is not None else "") or first,
        value=largest,
        limit=FLOAT16_MAX,
        remedy="use bfloat16, which has the range of float32; or compute this part in float32, "
        "under torch.autocast(device_type, enabled=False) and with x.float() as input.",
    )


def _overflow(evidence: Evidence) -> Iterator[Finding]:
    over = _beyond_float16(evidence.step_in_float32)
    if not over:
        return
    where, largest = max(over.items(), key=lambda item: item[1])
    only_bfloat16 = evidence.subject.low_precision == {torch.bfloat16}
    yield Finding(
        CHECK,
        "float16-overflow",
        "note" if only_bfloat16 else "warning",
        f"values in {several(list(over))} exceed float16's limit of 65504, up to {largest:.3g} in "
        f"{where}{_share(evidence.step_in_float32)}",
        where=next(iter(over)),
        value=largest,
        limit=FLOAT16_MAX,
        remedy="in float16 these values become Inf: use bfloat16, or scale the values down before "
        "this module.",
    )


def _share(step: Observation) -> str:
    over = [a.values for a in step.activations if a.values.over]
    n = sum(v.numel for v in over)
    return f"; {percent(sum(v.over for v in over) / n)} of these modules' outputs" if n else ""


def _underflow(evidence: Evidence) -> Iterator[Finding]:
    wide = evidence.step_in_float32
    if wide.gradients is None or wide.from_output:
        return
    values = [Values.of(g) for g in wide.gradients.values() if g is not None]
    not_zero = sum(v.numel - v.zeros for v in values)
    under = sum(v.under for v in values)
    if not not_zero or under / not_zero <= LOST_GRADIENTS:
        return
    largest = max(v.largest for v in values)
    # A quarter of the largest scale without overflow, since later batches may have larger
    # gradients.
    scale = 2.0 ** min(24, math.floor(math.log2(FLOAT16_MAX / largest)) - 2) if largest else 2.0**16
    yield Finding(
        CHECK,
        "float16-underflow",
        "warning" if torch.float16 in evidence.subject.low_precision else "note",
        f"{percent(under / not_zero)} of the gradients would round to 0 in float16 without "
        "loss scaling",
        value=under / not_zero,
        limit=LOST_GRADIENTS,
        remedy=f"with float16, use torch.amp.GradScaler(init_scale={scale:g}); bfloat16 and "
        "float32 need no loss scaling.",
    )


def _loss_differs(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.subject.low_precision:
        return
    narrow, wide = (sum(s.parts.values()) for s in (evidence.step, evidence.step_in_float32))
    if not narrow or not (math.isfinite(narrow) and math.isfinite(wide)):
        return
    difference = abs(narrow - wide) / max(abs(wide), 1e-3)
    if difference > LOSS_DIFFERENCE:
        name = _names(evidence.subject.low_precision)
        yield CHECK.warning(
            "precision-loss",
            f"the loss is {narrow:.4g} in {name}, but {wide:.4g} in float32",
            value=difference,
            limit=LOSS_DIFFERENCE,
            remedy="compute sums, norms, softmaxes and the loss in float32, under "
            "torch.autocast(device_type, enabled=False) and with x.float() as input.",
        )


def _rounded_updates(evidence: Evidence) -> Iterator[Finding]:
    if not any(p.dtype.itemsize == 2 for p in evidence.subject.parameters.values()):
        return
    if evidence.no_steps_reason:
        return
    updates = evidence.real_steps.updates
    stuck = {n: u for n, u in updates.items() if u.dtype.itemsize == 2 and u.stuck > ROUNDED}
    if not stuck:
        return
    worst = max(u.stuck for u in stuck.values())
    dtype = str(next(iter(stuck.values())).dtype).removeprefix("torch.")
    yield CHECK.warning(
        "rounded-update",
        f"a step leaves up to {percent(worst)} of the elements of {several(list(stuck))} "
        f"unchanged: the update is less than half of the distance between two {dtype} numbers",
        where=next(iter(stuck)),
        value=worst,
        limit=ROUNDED,
        remedy="keep the weights in float32 and compute in 16 bits under torch.autocast, or use "
        "stochastic rounding.",
    )


def _all_finite(step: Observation) -> bool:
    gradients = [g for g in (step.gradients or {}).values() if g is not None]
    return (
        not step.failures
        and not any(a.values.nonfinite for a in step.activations)
        and all(map(math.isfinite, step.parts.values()))
        and all(bool(g.isfinite().all()) for g in gradients)
    )


def _beyond_float16(step: Observation) -> dict[str, float]:
    """Returns, by module, the largest value that it computes or outputs beyond float16."""
    found: dict[str, float] = {}
    seen = [(large.where, large.largest) for large in step.functions.large]
    seen += [(a.where, a.values.largest) for a in step.activations if a.values.over]
    for where, largest in seen:
        found[where] = max(largest, found.get(where, 0.0))
    return found


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
