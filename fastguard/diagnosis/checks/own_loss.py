"""Recognizes models that compute their own loss, and suggests a `step=` for them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from torch import Tensor

from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.replay.subject import split

_TARGETS = frozenset("target targets label labels y y_true tgt gt ground_truth".split())


def step_for(evidence: Evidence) -> str:
    """Returns the `step=` to suggest for a model that takes targets; empty for other models."""
    batch = evidence.subject.batch
    inputs, targets = split(batch)
    if targets is None:
        return ""
    is_mapping = isinstance(inputs, Mapping)
    n_inputs = len(inputs) if isinstance(inputs, list | tuple) else 1
    taken = list(_arguments(evidence))
    beyond = [p for p in taken if p.name not in inputs] if is_mapping else taken[n_inputs:]
    label = next((p for p in beyond if p.name.lower() in _TARGETS), None)
    label = label or next((p for p in beyond if p.default is p.empty), None)
    if label is None:
        return ""
    given, target = ("batch[0]", "batch[1]")
    if isinstance(batch, Mapping):
        given, target = 'batch["inputs"]', 'batch["targets"]'
    stars = "**" if is_mapping else "*" if isinstance(inputs, list | tuple) else ""
    positional = not is_mapping and label is beyond[0] and label.kind is not label.KEYWORD_ONLY
    call = f"{stars}{given}, " + (target if positional else f"{label.name}={target}")
    call = "*batch" if call == "batch[0], batch[1]" else call
    return f"step=lambda model, batch: model({call})"


def plain_step(evidence: Evidence) -> str:
    """Returns the `step=` to suggest for a model that computes its loss from inputs alone."""
    inputs, targets = split(evidence.subject.batch)
    stars = "**" if isinstance(inputs, Mapping) else "*" * isinstance(inputs, list | tuple)
    part = "batch" if targets is None else "batch[0]"
    if isinstance(evidence.subject.batch, Mapping) and targets is not None:
        part = 'batch["inputs"]'
    return f"step=lambda model, batch: model({stars}{part})"


def hint_for(evidence: Evidence) -> str:
    """Returns advice for a model that may compute its own loss; empty if there is none."""
    step = step_for(evidence)
    if step:
        return f"a model that takes its targets and returns its own loss needs {step}"
    batch = evidence.subject.batch
    if isinstance(batch, Mapping):
        lacking = (p.name for p in _arguments(evidence) if p.name.lower() in _TARGETS)
        name = next((name for name in lacking if name not in batch), "")
        return f"the model computes its loss from {name}=; add {name!r} to the batch" * bool(name)
    return ""


def returns_its_loss(evidence: Evidence) -> bool:
    """Whether the model outputs one number for many targets and it is not used as the loss."""
    subject, step = evidence.subject, evidence.step
    output, targets = step.output, subject.targets
    return (
        subject.loss_fn is not None
        and isinstance(output, Tensor)
        and output.ndim == 0
        and isinstance(targets, Tensor)
        and targets.numel() > 1
        and list(step.parts.values()) != [float(output)]
    )


def _arguments(evidence: Evidence) -> Iterator[inspect.Parameter]:
    """Yields the parameters of the model's forward, in order."""
    try:
        taken = inspect.signature(evidence.subject.model.forward).parameters.values()
    except (TypeError, ValueError):
        return
    for one in taken:
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            yield one
