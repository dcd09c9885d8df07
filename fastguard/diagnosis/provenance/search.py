"""One search: replay forward, replay backward, build the report, and retry in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from fastguard.checkpoints.random_state import set_random_state
from fastguard.diagnosis.provenance import remedies
from fastguard.diagnosis.provenance.backward import BackwardTrace, NodeOrigin
from fastguard.diagnosis.provenance.circumstances import Explanation
from fastguard.diagnosis.provenance.forward import Cause, Event, ForwardTrace, Outside, Site
from fastguard.diagnosis.provenance.report import NonFiniteReport, Origin
from fastguard.diagnosis.replay.calls import all_finite, floats
from fastguard.diagnosis.replay.losses import loss_parts
from fastguard.diagnosis.replay.replay import Step, copied, in_float32, widened_batch

REACHED = 6
"""Maximum number of later operations that a report lists, one per module."""
NO_LOSS = "the step returned no loss; return a scalar tensor, or pass loss_fn="
NO_GRADIENT = "the loss does not require gradients; return it without .item() or .detach()"


class Search:
    """The replay of one step.

    Args:
        roots: The model under `""`, and a loss that is a module under its name.
        batch: See `explain_nonfinite`.
        step: Computes a loss from the model and a batch.
        autocast: The context of the step, which is entered again for each replay.
        rng: See `explain_nonfinite`.
        loss_scale: See `explain_nonfinite`.

    Attributes:
        modules: All modules involved.
        low_precision: Whether a float16 or bfloat16 tensor was created.
    """

    def __init__(
        self,
        roots: Mapping[str, nn.Module],
        batch: Any,
        step: Step,
        autocast: AbstractContextManager[Any],
        rng: Mapping[str, Any] | None,
        loss_scale: float,
    ) -> None:
        self._model = roots[""]
        self._names: dict[nn.Module, str] = {}
        self._outside: list[tuple[Origin, str, Tensor]] = []
        self._parameters: dict[Tensor, str] = {}
        for prefix, root in roots.items():
            for name, module in root.named_modules(prefix=prefix):
                self._names.setdefault(module, name or "the model")
            for name, parameter in root.named_parameters(prefix=prefix):
                self._parameters.setdefault(parameter, name)
                self._outside.append(("parameter", name, parameter))
            for name, buffer in root.named_buffers(prefix=prefix):
                self._outside.append(("buffer", name, buffer))
        self.modules: list[nn.Module] = list(self._names)
        self._batch = batch
        self._step = step
        self._autocast = autocast
        self._rng = rng
        self._loss_scale = loss_scale
        self.low_precision: bool = False

    def report(self) -> NonFiniteReport:
        """Replays forward, and backward if the loss is finite."""
        batch = copied(self._batch)
        dense = [known for known in (*self._outside, *_parts_of(batch)) if floats(known[2])]
        with ForwardTrace(self._names, dense) as trace:
            result = self._replay(batch)
        self.low_precision = trace.low_precision
        already = tuple(c.range for c in trace.already if isinstance(c, Outside))
        loss = loss_parts(result)
        # Other values that the step returns (logits with a mask of -Inf) are harmless.
        report = self._forward_report(trace, trace.cause_of(loss or result))
        if not report.found and loss:
            report = self._backward_report(trace, sum(loss.values(), torch.zeros(())))
        elif not report.found:
            report = NonFiniteReport(None, no_backward=NO_LOSS)
        values = {name: part.item() for name, part in loss.items()}
        return replace(report, already=already, loss=values)

    def with_precision(self, report: NonFiniteReport) -> NonFiniteReport:
        """Runs the batch in float32 and records whether the result is finite."""
        try:
            with in_float32(self.modules):
                result = self._replay(widened_batch(copied(self._batch)), autocast=False)
                loss = loss_parts(result)
                finite = all(map(all_finite, floats(loss or result)))
                if finite and loss and report.origin == "backward":
                    finite = not BackwardTrace(self._scaled(sum(loss.values()))).bad_leaves
        # some models work only in their own dtype; `precision` then stays unknown
        except Exception:
            return report
        return replace(report, precision=finite)

    def _replay(self, batch: Any, *, autocast: bool = True) -> Any:
        if self._rng is not None:
            set_random_state(self._rng)
        if not autocast:
            return self._step(self._model, batch)
        with self._autocast:
            return self._step(self._model, batch)

    def _scaled(self, loss: Any) -> Tensor:
        return loss if self._loss_scale == 1.0 else loss * self._loss_scale

    # Builds the report.

    def _forward_report(self, trace: ForwardTrace, causes: Sequence[Cause]) -> NonFiniteReport:
        origin, after = trace.origin_of(causes)
        if origin is None:
            return NonFiniteReport(None)
        reached = tuple(_reached(after))
        if isinstance(origin, Outside):
            first = after[0] if after else None
            return NonFiniteReport(
                origin=origin.origin,
                module=first.site.module if first else "",
                operation=first.operation if first else "",
                tensor=origin.range.name,
                source=first.site.source if first else None,
                inputs=(origin.range,),
                reached=reached,
                kind=origin.origin,
                remedy=remedies.OUTSIDE[origin.origin],
            )
        explanation = origin.explanation or _by_ranges(origin)
        return NonFiniteReport(
            origin="forward",
            module=origin.site.module,
            operation=origin.operation,
            tensor=", ".join(r.name for r in origin.outputs if r.nonfinite),
            source=origin.site.source,
            inputs=origin.inputs,
            outputs=origin.outputs,
            reached=reached,
            kind=explanation.kind,
            evidence=explanation.evidence,
            remedy=explanation.remedy,
            # False is inconclusive, since the cause may be earlier
            precision=origin.precision or None,
        )

    def _backward_report(self, trace: ForwardTrace, loss: Tensor) -> NonFiniteReport:
        if loss.grad_fn is None:
            return NonFiniteReport(None, no_backward=NO_GRADIENT)
        backward = BackwardTrace(self._scaled(loss))
        if not backward.bad_leaves:
            return NonFiniteReport(None)
        names = tuple(
            self._parameters.get(t, f"a leaf of shape {tuple(t.shape)}")
            for t in backward.bad_leaves
        )
        node = backward.origin
        if node is None:
            return NonFiniteReport("backward", bad_gradients=names, remedy=remedies.OTHER.remedy)
        # Forward values hidden by torch.where reappear as factors of the gradient.
        hidden = [c for c in trace.cause_of(list(node.bad_saved)) if not c.placed]
        if hidden:
            report = self._forward_report(trace, hidden)
            reached = (*report.reached, f"hidden from the loss, but a factor in {node.name}")
            return replace(report, bad_gradients=names, reached=reached)
        site = _site_of(node, trace.sites)
        kind = remedies.kind_of(node.name)
        return NonFiniteReport(
            origin="backward",
            module=site.module,
            operation=node.name,
            tensor="outgoing gradient",
            source=site.source,
            inputs=node.inputs,
            outputs=node.outputs,
            bad_gradients=names,
            kind=kind.name,
            evidence=remedies.evidence_of(kind, node.inputs, node.name),
            remedy=kind.remedy,
        )


_WRITTEN = Explanation(
    "an Inf that the program wrote",
    "the program wrote this Inf, as masks do, and nothing removed it afterward",
    "if a whole row is masked, its maximum, logsumexp or sum is Inf too: exclude such rows from "
    "the loss, or mask with a large finite number such as torch.finfo(x.dtype).min.",
)


def _by_ranges(event: Event) -> Explanation:
    """Explains an operation by the ranges of its inputs."""
    if event.placed:
        return _WRITTEN
    kind = remedies.kind_at(event.operation, event.inputs)
    return Explanation(
        kind.name,
        remedies.evidence_of(kind, event.inputs, event.operation),
        remedies.remedy_at(event.operation, event.inputs),
    )


def _parts_of(batch: Any) -> Iterator[tuple[Origin, str, Tensor]]:
    """Yields the tensors of a batch, by name."""
    for path, leaf in tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, Tensor):
            yield "batch", "batch" + "".join(map(str, path)), leaf


def _site_of(node: NodeOrigin, sites: Mapping[int, Site]) -> Site:
    """Returns where a node's operation was called; if unknown, the place of the previous node."""
    numbers = [n for n in sites if n <= node.sequence]
    return sites[max(numbers)] if numbers else Site("", None)


def _reached(events: Sequence[Event]) -> list[str]:
    """Returns the first event of each module, in order."""
    first: dict[str, Event] = {}
    for event in events:
        first.setdefault(event.site.module, event)
    named = [f"{module or 'outside of modules'}: {e.operation}" for module, e in first.items()]
    return named[:REACHED]
