"""`diagnose`: one run of checks on a model, a batch and a loss, in the order in which things break.

Every family of checks looks at the same evidence: one step as the model is trained, the same step
in float32, a few real steps. One that fails does not stop the others.
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
    """Says what is wrong with a training setup, the most important first, each with a remedy.

    Initialisation, data, forward pass, loss, backward pass, precision, optimizer, and a few real
    steps on the batch. Nothing is changed afterwards: parameters, buffers, gradients, the
    optimizer's state and param groups, training flags and random number generators are as before,
    bit for bit; hooks of the optimizer do not run. Keeps one copy of the model and of the
    optimizer's state. For one process: DataParallel and DistributedDataParallel are unwrapped.
    Compiled parts run eagerly. Waits for a GPU.

    Args:
        model: The model, in the mode and with the weights that are to be looked at.
        batch: `(inputs, targets)`; or a mapping with just these two keys; or another mapping, the
            keyword arguments of the model. Inputs that are a tuple or a mapping are unpacked.
        loss_fn: The loss is `loss_fn(model(inputs), targets)`, a scalar or a dict of scalars by
            name; of a mapping, `loss_fn(output, batch)`. None: it is the output's `loss`.
        optimizer: What trains the model; a `GuardedOptimizer` is looked into. None: a few steps of
            AdamW show whether the model can learn at all.
        data: Further batches, a DataLoader for example; the first 8 are looked at. An iterator
            loses those.
        step: In place of `loss_fn`: `step(model, batch)` returns the loss; or a dict of parts whose
            sum is the loss; or a dict, an object or a tuple that has the loss in it, under `loss`
            or as its first entry. It does not go backward and does not step the optimizer.
        autocast: What training runs under: `torch.autocast("cuda", torch.float16)` for example, or
            `"float16"` or `"bfloat16"`, on the model's device.

    Returns:
        The findings. `print` shows them; `errors`, `worst` and `of(kind)` select among them.

    Raises:
        TypeError: An argument is of the wrong kind. What model and loss raise becomes a finding.
        ValueError: A parameter has no values yet: it is lazy, or on the meta device.

    Example:
        >>> import torch, fastguard
        >>> model = torch.nn.Linear(4, 1)
        >>> batch = torch.randn(8, 4), torch.randn(8)  # an output of (8, 1) meets targets of (8,)
        >>> found = fastguard.diagnose(model, batch, torch.nn.functional.mse_loss)
        >>> found.errors[0].kind, found.errors[0].seen
        ('silent-broadcast', 'mse_loss silently expands output [8, 1] and target [8] to [8, 8]:
        every output meets the targets of others')
    """
    start = time.perf_counter()
    subject = Subject.of(model, batch, loss_fn, optimizer, data, step, autocast)
    kept = State(subject)
    try:
        with (
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            unguarded(),
            warnings.catch_warnings(action="ignore"),  # what they warn of becomes a finding
        ):
            evidence = Evidence(subject, kept)
            findings = [f for name, check in FAMILIES.items() for f in _run(name, check, evidence)]
    finally:
        kept.restore()
    findings.sort(key=by_importance)
    return Diagnosis(tuple(findings), time.perf_counter() - start)


def _run(name: str, check: Check, evidence: Evidence) -> list[Finding]:
    """What one family finds, up to where it fails; a family without complaints says that it ran."""
    findings: list[Finding] = []
    try:
        findings.extend(check(evidence))
    except Exception as error:  # of the model's code, in a pass that goes otherwise than the first
        seen = f"the check stopped at {type(error).__name__}: {error}"
        remedy = "what it had found until then is told; the other checks went on."
        findings.append(Finding(name, "not-checked", "warning", seen, remedy=remedy))
    if not any(f.severity in ("error", "warning", "ok") for f in findings):
        if not any(f.kind == "not-checked" for f in findings):
            findings.append(Finding(name, "ok", "ok", "nothing bad"))
    return findings
