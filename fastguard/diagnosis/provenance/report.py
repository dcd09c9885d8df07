"""`NonFiniteReport`: the result of a search for the first non-finite value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastguard.diagnosis.replay.tensor_range import TensorRange
from fastguard.errors.plain_text import printable

Origin = Literal["forward", "backward", "parameter", "buffer", "batch", "constant"]


@dataclass(frozen=True, slots=True)
class NonFiniteReport:
    """The origin of the first non-finite value in a step, if there is one.

    Attributes:
        origin: `"forward"` or `"backward"`: an operation computed it from finite values.
            `"parameter"`, `"buffer"`, `"batch"`, `"constant"`: it existed before the step. None:
            nothing found.
        module: Name and class of the innermost module around the operation.
        operation: `aten.div.Tensor`; in the backward pass the autograd node, `DivBackward0`.
        tensor: Where the value first appeared: an output of the operation, or the name of the
            parameter, buffer or part of the batch.
        source: `file:line in function: text` of the user's code that called the operation.
        inputs, outputs: Ranges of the operation's inputs and outputs. In the backward pass, the
            inputs are the incoming gradients and saved tensors, and the outputs are the outgoing
            gradients.
        already: Parameters, buffers and parts of the batch that were non-finite before the step.
        reached: Later operations with non-finite outputs, one per module.
        loss: The loss, or its parts by name.
        bad_gradients: Parameters with a non-finite gradient; empty if the loss is non-finite.
        kind: The kind of operation, as in `remedies.KINDS`, or of fault, as in `circumstances`.
        evidence: The property of the ranges that explains the value.
        remedy: What to do about the cause.
        precision: True: the same computation in float32 is finite, so the cause is the range of
            float16 or bfloat16. False: float32 does not help. None: no low precision was used, or
            float32 could not be tried.
        no_backward: Why the gradients were not computed, although the forward pass is finite; empty
            if they were.
    """

    origin: Origin | None
    module: str = ""
    operation: str = ""
    tensor: str = ""
    source: str | None = None
    inputs: tuple[TensorRange, ...] = ()
    outputs: tuple[TensorRange, ...] = ()
    already: tuple[TensorRange, ...] = ()
    reached: tuple[str, ...] = ()
    loss: dict[str, float] = field(default_factory=dict)
    bad_gradients: tuple[str, ...] = ()
    kind: str = ""
    evidence: str = ""
    remedy: str = ""
    precision: bool | None = None
    no_backward: str = ""

    @property
    def found(self) -> bool:
        """Whether a non-finite value reached the loss or a gradient."""
        return self.origin is not None

    def __str__(self) -> str:
        """Formats the report for users."""
        if self.origin is None:
            lines = [
                f"Nothing found in the outputs. There was no backward pass: {self.no_backward}."
                if self.no_backward
                else "Nothing found: loss and gradients of this batch are finite.",
                "If the step did fail in training, its weights or random numbers were different: "
                "call explain_nonfinite before the weights change, and pass the rng= saved before "
                "the batch.",
            ]
        else:
            lines = [self._headline(), *self._where()]
        if self.loss:
            parts = ", ".join(f"{name}={value:.4g}" for name, value in self.loss.items())
            lines += _section("loss", [parts])
        lines += _section("already", [str(r) for r in self.already])
        if self.evidence:
            lines.append(f"Why: {self.evidence}.")
        if self.precision is not None:
            lines.append("Precision: " + _PRECISION[self.precision])
        if self.remedy:
            lines.append(f"Remedy: {self.remedy}")
        return "\n".join(map(printable, lines))

    def _headline(self) -> str:
        if self.origin in ("forward", "backward"):
            return f"The first non-finite value appeared in the {self.origin} pass."
        return f"A {self.origin} value was non-finite before any operation: {self.tensor}."

    def _where(self) -> list[str]:
        computed = self.origin in ("forward", "backward")
        one = {
            "module": self.module,
            "operation" if computed else "used by": self.operation,
            "tensor": self.tensor if computed else "",
            "source": self.source or "",
        }
        many = {
            "inputs": list(map(str, self.inputs)),
            "outputs": list(map(str, self.outputs)),
            "reached": list(self.reached),
            "gradients": _first(self.bad_gradients, 8),
        }
        lines = [line for title, text in one.items() if text for line in _section(title, [text])]
        return lines + [line for title, rows in many.items() for line in _section(title, rows)]


_PRECISION = {
    True: "the same computation in float32 is finite: the cause is the range of the 16-bit format, "
    "not the model. Compute this part in float32, or use bfloat16 instead of float16.",
    False: "the same computation in float32 is not finite either: precision is not the cause.",
}


def _section(title: str, rows: Sequence[str]) -> list[str]:
    return [f"  {title if i == 0 else '':<9} {row}" for i, row in enumerate(rows)]


def _first(names: Sequence[str], n: int) -> list[str]:
    more = [f"and {len(names) - n} more"] if len(names) > n else []
    return [*names[:n], *more]
