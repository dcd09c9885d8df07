"""`gradients_of`: the gradients of a loss, without leaving them in `.grad`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard.diagnosis.provenance.backward import graph_of


def gradients_of(total: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient for each parameter, None where the loss does not depend on it.

    `.grad` and the hooks that wait for it are left alone, with one exception: activation
    checkpoints of the old, reentrant kind hide their parameters from the graph and put gradients
    into `.grad` alone. There it is used and put back, and such hooks run.
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
    """Whether an activation checkpoint of the reentrant kind lies below this tensor."""
    if total.grad_fn is None:
        return False
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_of(total.grad_fn))
