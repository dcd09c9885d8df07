"""Running a batch again and leaving no trace: `Untouched`, and how a batch becomes a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastguard.checkpoints.random_state import random_state, set_random_state
from fastguard.diagnosis.replay.calls import LOW
from fastguard.diagnosis.replay.losses import carried_loss

Step = Callable[[nn.Module, Any], Any]


class Untouched:
    """Puts modules and random number generators back as they were, bit for bit.

    Parameters and buffers are kept in host memory (one copy of the model); attributes of modules,
    training flags among them, are kept as they are, so that what a forward pass assigns is undone.
    Lists and dicts that it changes in place are not.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._attributes = [(m, _shallow(m.__dict__)) for m in modules]
        tensors = {t for m in modules for d in (m._parameters, m._buffers) for t in d.values()}
        self._tensors = [(t, t.detach().cpu().clone()) for t in tensors if t is not None]
        self._rng = random_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes everything since the start."""
        for module, attributes in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(_shallow(attributes))
        for tensor, kept in self._tensors:
            if not _same_bits(tensor.detach().cpu(), kept):
                tensor.copy_(kept)
        set_random_state(self._rng)


_TABLES = ("_parameters", "_buffers", "_modules")


def _shallow(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose tables of parameters, buffers and modules are copies too.

    Those of a scripted module cannot be copied; neither can a forward pass replace what is in them.
    """
    return {
        k: v.copy() if k in _TABLES and isinstance(v, dict) else v for k, v in attributes.items()
    }


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also for NaN, which equals nothing."""
    bytes_of = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*bytes_of)


def copied(batch: Any) -> Any:
    """The batch with tensors of its own: a model may write into its inputs."""

    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return tree_map(copy, batch)


def step_of(loss_fn: Callable[..., Any] | None, step: Step | None) -> Step:
    """How a model and a batch become a loss, or an output if there is no loss."""
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
    inputs, targets = batch  # of no other kind: `check_batch_kind`
    return inputs, targets


@contextmanager
def in_float32(modules: list[nn.Module]) -> Iterator[None]:
    """Parameters and buffers in float32 and no autocast; `Untouched.restore` undoes the former."""
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
    """The batch with its 16-bit tensors in float32."""
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in LOW else x, batch)
