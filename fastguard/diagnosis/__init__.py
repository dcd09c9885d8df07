"""`diagnose`: runs all checks on a model, a batch and a loss, ordered by what breaks first.

All checks use the same evidence: one step under training conditions, the same step in float32, and
a few real steps. A failed check does not stop the other checks.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastguard.diagnosis.activations import unguarded
from fastguard.diagnosis.checks import FAMILIES, Check
from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import CHECKS as CHECKS
from fastguard.diagnosis.finding import KINDS as KINDS
from fastguard.diagnosis.finding import Finding as Finding
from fastguard.diagnosis.finding import Severity as Severity
from fastguard.diagnosis.finding import by_importance
from fastguard.diagnosis.replay.arguments import Autocast
from fastguard.diagnosis.replay.replay import Step
from fastguard.diagnosis.replay.restore import State
from fastguard.diagnosis.replay.subject import Subject
from fastguard.diagnosis.report import Diagnosis as Diagnosis


def diagnose(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: Optimizer | None = None,
    data: Iterable[Any] | None = None,
    *,
    step: Step | None = None,
    autocast: Autocast = None,
) -> Diagnosis:
    """Reports what is wrong with a training setup, most important first, each with a remedy.

    Checks initialization, data, forward pass, loss, backward pass, precision and optimizer, and
    takes a few real steps on the batch. All state is restored afterward, bit for bit: parameters,
    buffers, gradients, the optimizer's state and param groups, training flags and random number
    generators; hooks of the optimizer do not run. The function needs memory for one copy of the
    model and of the optimizer's state. It runs in one process: DataParallel and
    DistributedDataParallel are unwrapped, and compiled parts run eagerly. It synchronizes with the
    GPU.

    Args:
        model: The model, in the mode and with the weights to be diagnosed.
        batch: `(inputs, targets)`; a mapping with exactly the keys `"inputs"` and `"targets"`; or
            any other mapping, which is passed to the model as keyword arguments. A tuple or mapping
            of inputs is unpacked.
        loss_fn: Called as `loss_fn(model(inputs), targets)`, or as `loss_fn(output, batch)` if the
            batch is a mapping of keyword arguments. Returns a scalar or a dict of named scalars.
            None: the loss is the output's `loss`.
        optimizer: The optimizer that trains the model; a `GuardedOptimizer` is unwrapped. None: a
            few AdamW steps show whether the model can learn at all.
        data: Further batches, such as a DataLoader; the first 8 are checked. If `data` is an
            iterator, these batches are consumed.
        step: Replaces `loss_fn`: `step(model, batch)` returns the loss, a dict of parts whose sum
            is the loss, or a dict, object or tuple that contains the loss under `loss` or as its
            first entry. It must not call backward or step the optimizer.
        autocast: The autocast used in training: a context such as
            `torch.autocast("cuda", torch.float16)`, or `"float16"` or `"bfloat16"` for the model's
            device.

    Returns:
        The findings. Print them, or select some with `errors`, `worst` and `of(kind)`.

    Raises:
        TypeError: An argument has the wrong type. Errors of the model and the loss become findings.
        ValueError: A parameter has no values yet: it is lazy, or on the meta device.

    Example:
        >>> import torch, fastguard
        >>> model = torch.nn.Linear(4, 1)
        >>> batch = torch.randn(8, 4), torch.randn(8)  # the outputs will be (8, 1), not (8,)
        >>> found = fastguard.diagnose(model, batch, torch.nn.functional.mse_loss)
        >>> found.errors[0].kind, found.errors[0].seen
        ('silent-broadcast', 'mse_loss silently expands output [8, 1] and target [8] to [8, 8], so
        it compares every output with all targets')
    """
    start = time.perf_counter()
    subject = Subject.of(model, batch, loss_fn, optimizer, data, step, autocast)
    kept = State(subject)
    try:
        with (
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            unguarded(),
            # warnings are hidden, since they become findings
            warnings.catch_warnings(action="ignore"),
        ):
            evidence = Evidence(subject, kept)
            findings = [f for name, check in FAMILIES.items() for f in _run(name, check, evidence)]
    finally:
        kept.restore()
    findings.sort(key=by_importance)
    return Diagnosis(tuple(findings), time.perf_counter() - start)


def _run(name: str, check: Check, evidence: Evidence) -> list[Finding]:
    """Returns the findings of one family of checks, or "ok" if there are none."""
    findings: list[Finding] = []
    try:
        findings.extend(check(evidence))
    except Exception as error:  # the model's code may behave differently in a later pass
        seen = f"the check stopped with {type(error).__name__}: {error}"
        remedy = "the findings from before the error are included, and all other checks ran."
        findings.append(Finding(name, "not-checked", "warning", seen, remedy=remedy))
    if not any(f.severity in ("error", "warning", "ok") for f in findings):
        if not any(f.kind == "not-checked" for f in findings):
            findings.append(Finding(name, "ok", "ok", "no problems found"))
    return findings
