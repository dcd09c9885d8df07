"""`gradients_of`: computes gradients of a loss without leaving them in `.grad`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard.diagnosis.provenance.backward import graph_of


def gradients_of(total: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns the gradient of each parameter, or None if the loss does not depend on it.

    `.grad` and its hooks are not touched, with one exception: reentrant activation checkpoints hide
    their parameters from the graph and write gradients to `.grad` only. For such checkpoints,
    `.grad` is used and restored, and its hooks run.
    """
    if not hides_parameters(total):
        return list(torch.autograd.grad(total, parameters, allow_unused=True))
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        total.backward()
        return [p.grad for p in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def hides_parameters(total: Tensor) -> bool:
    """Whether the graph of this tensor contains a reentrant activation checkpoint."""
    if total.grad_fn is None:
        return False
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_of(total.grad_fn))
