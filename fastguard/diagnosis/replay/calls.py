"""One call of an ATen operator, and queries on its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastguard.diagnosis.replay.tensor_range import as_real

LOW = (torch.float16, torch.bfloat16)
_OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_")


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor is finite, in one read; synchronizes with the GPU."""
    x = as_real(tensor)
    if not x.numel() or not x.is_floating_point():
        return True
    low, high = x.aminmax()  # NaN propagates
    return math.isfinite(low.item()) and math.isfinite(high.item())


def floats(tree: Any) -> list[Tensor]:
    """Returns the tensors that can contain NaN, from nested containers."""
    return [
        t
        for t in tree_leaves(tree)
        if isinstance(t, Tensor)
        and (t.is_floating_point() or t.is_complex())
        and t.layout is torch.strided
    ]


def storage_of(tensor: Tensor) -> int:
    """Returns a key that identifies the storage of a tensor."""
    return tensor.untyped_storage()._cdata


def is_view(func: Callable[..., Any]) -> bool:
    """Whether an operator only returns a view of its input."""
    returns = func._schema.returns  # type: ignore[attr-defined]
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@dataclass(slots=True)
class Call:
    """One call of an operator: its tensors by the names in its schema."""

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    name: str
    inputs: list[tuple[str, Tensor]]
    numbers: list[float]
    written: list[Tensor]
    before: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """Builds a call from the arguments that the dispatcher receives."""
        inputs, numbers, written = [], [], []
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            tensors = floats(value)
            many = isinstance(value, list | tuple)
            inputs += [
                (f"{argument.name}[{k}]" * many or argument.name, t) for k, t in enumerate(tensors)
            ]
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tensors
            numbers += [x for x in tree_leaves(value) if isinstance(x, float)]
        name = func.__name__.split(".")[0]
        return Call(func, args, kwargs, name, inputs, numbers, written)

    def argument(self, name: str) -> Any:
        """Returns the argument with this name in the schema, with its value before the call."""
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                value = self.args[i] if i < len(self.args) else self.kwargs.get(name)
                return self.before.get(id(value), value)
        return None

    def save_overwritten(self) -> None:
        """Copies inputs that the call will overwrite, unless the call ignores their contents."""
        if self.name not in _OVERWRITES:
            self.before = {id(t): t.detach().clone() for t in self.written}

    def read(self) -> list[tuple[str, Tensor, Tensor]]:
        """Returns name, tensor, and value before the call, for every input whose value matters."""
        ignored = set() if self.before else {id(t) for t in self.written}
        return [(n, t, self.before.get(id(t), t)) for n, t in self.inputs if id(t) not in ignored]

    def is_finite_in_float32(self, outputs: Sequence[Tensor]) -> bool | None:
        """Whether the operation gives a finite output on the same values in float32."""
        read = [value for _, _, value in self.read()]
        if not any(t.dtype in LOW for t in [*read, *outputs]):
            return None

        def wide(x: Any) -> Any:
            if isinstance(x, Tensor):
                x = self.before.get(id(x), x).detach()
                return x.float() if x.is_floating_point() else x
            return torch.float32 if x in LOW and isinstance(x, torch.dtype) else x

        try:
            with _rng_untouched(), torch.autocast(outputs[0].device.type, enabled=False):
                again = self.func(*tree_map(wide, self.args), **tree_map(wide, self.kwargs))
        except Exception:  # the operation has no float32 variant, so the result is unknown
            return None
        return all(all_finite(t) for t in floats(again))


def _rng_untouched() -> Any:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices=list(devices))
