"""`Evidence`: the data that the checks examine, computed on first use, without side effects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastguard.diagnosis.observe import Observation, Values, observe
from fastguard.diagnosis.part_gradients import part_gradients, perturb
from fastguard.diagnosis.provenance import NonFiniteReport, explain_nonfinite
from fastguard.diagnosis.replay.calls import floats
from fastguard.diagnosis.replay.replay import copied, in_float32, widened_batch
from fastguard.diagnosis.replay.restore import State
from fastguard.diagnosis.replay.subject import Subject, split
from fastguard.diagnosis.trial_steps import RealSteps, take_steps

N_BATCHES = 8
"""How many batches of `data` are checked."""

T = TypeVar("T")


class Evidence:
    """Lazily computed observations of a subject. Each pass starts from the saved state.

    Attributes:
        subject: The model, the batch and the step to diagnose.
    """

    def __init__(self, subject: Subject, kept: State) -> None:
        self.subject = subject
        self._kept = kept

    def isolated(self, work: Callable[[], T]) -> T:
        """Runs `work` from the saved state and restores that state afterward."""
        self._kept.restore()
        try:
            return work()
        finally:
            self._kept.restore()

    @cached_property
    def step(self) -> Observation:
        """One step under training conditions."""
        return self.isolated(lambda: observe(self.subject))

    @cached_property
    def step_in_float32(self) -> Observation:
        """The same step in float32; the object `step` itself if no 16-bit dtype is involved."""
        if not self.subject.low_precision:
            return self.step

        def work() -> Observation:
            with in_float32(list(self.subject.modules)):
                wide = replace(self.subject, autocast=nullcontext())
                return observe(wide, widened_batch(self.subject.batch))

        return self.isolated(work)

    @cached_property
    def gradients(self) -> dict[str, Values]:
        """The gradients that the step produced, by parameter."""
        found = self.step.gradients or {}
        return {name: Values.of(g) for name, g in found.items() if g is not None}

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of the optimizer, or all if the optimizer has none."""
        trainable = {n: p for n, p in self.subject.parameters.items() if p.requires_grad}
        optimizer = self.subject.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        held = {p for group in groups for p in group["params"]}
        return {n: p for n, p in trainable.items() if p in held} or trainable

    @property
    def is_detached(self) -> bool:
        """Whether there is a loss, but no trained parameter has a gradient from it."""
        gradients = self.step.gradients
        if not self.step.has_loss or self.step.from_output:
            return False
        return gradients is None or all(gradients.get(name) is None for name in self.trained)

    @cached_property
    def part_gradients(self) -> dict[str, dict[str, float]]:
        """Gradient norms by part of the loss and by trained parameter."""
        return self.isolated(lambda: part_gradients(self.subject, self.trained))

    @cached_property
    def part_gradients_nearby(self) -> dict[str, dict[str, float]]:
        """`part_gradients` at perturbed weights, where a part at its optimum has a gradient."""

        def work() -> dict[str, dict[str, float]]:
            perturb(self.trained)
            return part_gradients(self.subject, self.trained)

        return self.isolated(work)

    @property
    def no_steps_reason(self) -> str:
        """Why no real steps can be taken; empty if steps can be taken."""
        step = self.step
        if step.failed("backward"):
            return "the backward pass raises"
        if not step.has_loss:
            return "there is no loss"
        if step.gradients is None or self.is_detached:
            return "the loss has no gradient"
        if not self.is_finite:
            return "the loss or its gradients are not finite"
        return ""

    @property
    def is_finite(self) -> bool:
        """Whether everything that the step computes is finite."""
        step = self.step
        return not (
            any(a.values.nonfinite for a in step.activations)
            or any(not _finite(value) for value in step.parts.values())
            or any(values.nonfinite for values in self.gradients.values())
        )

    @cached_property
    def explained(self) -> NonFiniteReport | None:
        """Where the first non-finite value appeared; None if there is none, or if it is not found.

        If there is no loss, the values that reach the output are examined instead.
        """
        if self.is_finite:
            return None
        loss_fn, step = self.subject.loss_fn, self.subject.given_step
        if self.step.failures:
            loss_fn, step = _mean_of_output, None
        with contextlib.suppress(Exception):  # `step` raises and reports the same errors
            report = self.isolated(
                lambda: explain_nonfinite(
                    self.subject.model,
                    self.subject.batch,
                    loss_fn,
                    step=step,
                    autocast=self.subject.autocast,
                )
            )
            return report if report.found else None
        return None

    @cached_property
    def repaired(self) -> Evidence:
        """Evidence for the batch with NaN and Inf set to 0, if they reach the loss.

        A non-finite batch would cause all later findings; with the repaired batch, checks can find
        other problems.
        """
        report = self.explained
        if report is None or report.origin != "batch":
            return self

        def repair(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return torch.where(x.isfinite(), x, torch.zeros_like(x))

        batch = tree_map(repair, copied(self.subject.batch))
        return Evidence(replace(self.subject, batch=batch), self._kept)

    @cached_property
    def real_steps(self) -> RealSteps:
        """A few real steps; requires a finite loss."""
        return self.isolated(lambda: take_steps(self.subject, self.trained))

    @cached_property
    def further_batches(self) -> list[Any]:
        """The first batches of `data`."""
        if self.subject.data is None:
            return []
        return self.isolated(lambda: list(islice(self.subject.data or (), N_BATCHES)))

    def batches(self) -> Iterator[tuple[str, Any, Any]]:
        """Yields `(name prefix, inputs, targets)` for the batch and the batches of `data`."""
        yield ("", *split(self.subject.batch))
        for i, batch in enumerate(self.further_batches):
            yield (f"data[{i}].", *split(batch))


def _finite(value: float) -> bool:
    return value - value == 0.0


def _mean_of_output(output: Any, *_: Any) -> Tensor:
    return torch.stack([t.double().mean() for t in floats(output)]).sum()
