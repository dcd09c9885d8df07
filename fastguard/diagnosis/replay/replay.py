"""Copies batches and computes losses for a replay; `restore` undoes its effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastguard.diagnosis.replay.calls import LOW
from fastguard.diagnosis.replay.losses import carried_loss

Step = Callable[[nn.Module, Any], Any]


def copied(batch: Any) -> Any:
    """Copies the tensors of a batch, since a model may write to its inputs."""

    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return tree_map(copy, batch)


def step_of(loss_fn: Callable[..., Any] | None, step: Step | None) -> Step:
    """Returns `step(model, batch)`, which computes the loss, or the output if there is no loss."""
    if step is not None:
        return step

    def run(model: nn.Module, batch: Any) -> Any:
        inputs, target = _split(batch)
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)
        if loss_fn is not None:
            return loss_fn(output, batch if target is _NO_TARGET else target)
        loss = carried_loss(output)
        return output if loss is None else loss

    return run


_NO_TARGET = object()


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        if set(batch) == {"inputs", "targets"}:
            return batch["inputs"], batch["targets"]
        return batch, _NO_TARGET
    inputs, targets = batch  # `check_batch_kind` has refused all other kinds
    return inputs, targets


@contextmanager
def in_float32(modules: list[nn.Module]) -> Iterator[None]:
    """Converts parameters and buffers to float32 and disables autocast; `ModuleState` undoes it."""
    wide: dict[Tensor, Tensor] = {}

    def widened(t: Tensor | None) -> Tensor | None:
        if t is None or t.dtype not in LOW:
            return t
        if t not in wide:
            new = t.detach().float()
            is_parameter = isinstance(t, nn.Parameter)
            wide[t] = nn.Parameter(new, t.requires_grad) if is_parameter else new
        return wide[t]

    for module in modules:
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                table[name] = widened(tensor)  # type: ignore[assignment]
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def widened_batch(batch: Any) -> Any:
    """Returns the batch with its 16-bit tensors converted to float32."""
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in LOW else x, batch)
