"""Compares the shapes of a model's outputs with the shapes of its targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fastguard.diagnosis.observe import Observation


def misfits(output: Any, target: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields position, output and target of each pair whose shapes differ.

    An output without dimensions is a loss computed by the model and is not compared.
    """
    for where, a, b in _paired(output, target, ""):
        if a.ndim and a.shape != b.shape and not _are_classes(a, b):
            yield where, a, b


def raised_by_shapes(step: Observation, targets: Any) -> bool:
    """Whether mismatched shapes of output and targets explain an error raised by the loss."""
    if step.failed("loss") is None:
        return False
    raised = any(mismatch.result is None for mismatch in step.functions.shape_mismatches)
    return raised or any(True for _ in misfits(step.output, targets))


def _paired(output: Any, target: Any, where: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    if isinstance(output, Tensor) and isinstance(target, Tensor):
        yield where, output, target
    elif isinstance(output, Mapping) and isinstance(target, Mapping):
        for key in (key for key in output if key in target):
            yield from _paired(output[key], target[key], f"{where}.{key}".lstrip("."))
    elif isinstance(output, list | tuple) and isinstance(target, list | tuple):
        for i, (a, b) in enumerate(zip(output, target, strict=False)):
            yield from _paired(a, b, f"{where}[{i}]")


def _are_classes(output: Tensor, target: Tensor) -> bool:
    """Whether the target may be class indices: the output's shape without the class axis."""
    if target.is_floating_point():
        return False
    shape = output.shape
    return target.shape in (shape[:1] + shape[2:], shape[:-1])
