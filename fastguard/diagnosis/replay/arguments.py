"""Validates the arguments of `explain_nonfinite` and `diagnose` before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

Autocast = AbstractContextManager[Any] | torch.dtype | str | None
"""The context of a step, or the dtype of `torch.autocast` on the model's device."""

_DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def checked_model(model: Any) -> nn.Module:
    """Returns the model without DataParallel, DistributedDataParallel or torch.compile wrappers.

    Raises:
        TypeError: The model is not a module.
        ValueError: A parameter or buffer has no values yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    named = [*model.named_parameters(), *model.named_buffers()]
    empty = [n for n, p in named if is_lazy(p) or p.is_meta]
    if empty:
        raise ValueError(
            f"{empty[0]} has no values yet (it is lazy, or on the meta device); run one batch "
            "through the model first, or load its weights"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)  # torch.compile wrapper


def check_functions(loss_fn: Any, step: Any) -> None:
    """Checks that at most one of `loss_fn` and `step` is given, and that it is callable.

    Raises:
        TypeError: Both are given, or one cannot be called.
    """
    if loss_fn is not None and step is not None:
        raise TypeError("both loss_fn and step are given; step already returns the loss")
    for name, value in (("loss_fn", loss_fn), ("step", step)):
        if value is not None and not callable(value):
            raise TypeError(f"{name}={value!r} cannot be called; pass a function")
        if inspect.isclass(value) and issubclass(value, nn.Module):
            raise TypeError(
                f"{name} is the class {value.__name__}; pass an instance of it: {value.__name__}()"
            )


def check_batch_kind(batch: Any, *, any_kind: bool) -> None:
    """Checks that `batch` is one batch, of `any_kind` if a `step` handles its structure.

    Raises:
        TypeError: The type is unknown, or the object yields batches.
        ValueError: A tensor in it is on the meta device.
    """
    if isinstance(batch, DataLoader):
        raise TypeError("batch is a DataLoader; pass one batch from it: next(iter(loader))")
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves(batch)):
        raise ValueError("a tensor of the batch is on the meta device and has no values")
    is_pair = isinstance(batch, list | tuple) and len(batch) == 2
    if any_kind or is_pair or isinstance(batch, Mapping):
        return
    what = f"a {type(batch).__name__}"
    if isinstance(batch, list | tuple):
        what += f" of {len(batch)}"
    hint = "; next(...) returns one batch" if hasattr(batch, "__next__") else ""
    raise TypeError(
        f"batch is {what}; pass (inputs, targets), a mapping, or step=lambda model, batch: loss"
        f"{hint}"
    )


def context_of(autocast: Any, model: nn.Module) -> AbstractContextManager[Any]:
    """Returns the context that a step runs under.

    Raises:
        TypeError: The value is neither a context nor a dtype.
        ValueError: Autocast does not support this dtype.
    """
    if autocast is None:
        return nullcontext()
    if isinstance(autocast, str | torch.dtype):
        name = str(autocast).removeprefix("torch.")
        if name not in _DTYPES:
            raise ValueError(
                f"autocast={autocast!r}: choose 'float16' or 'bfloat16', or pass "
                "torch.autocast(device_type, dtype)"
            )
        device = next((p.device.type for p in model.parameters()), "cpu")
        return torch.autocast(device, _DTYPES[name])
    if not isinstance(autocast, AbstractContextManager):
        raise TypeError(
            f"autocast={autocast!r} is not a context; pass 'float16', 'bfloat16' or "
            "torch.autocast(device_type, dtype)"
        )
    return autocast


def check_rng(rng: Any) -> None:
    """Checks that `rng` is a state of the generators.

    Raises:
        TypeError: The value is not a generator state.
    """
    if rng is not None and not (isinstance(rng, Mapping) and "torch" in rng):
        raise TypeError(
            f"rng={rng!r} is not a generator state; pass fastguard.random_state(), taken before "
            "the batch (a seed does not determine the state of the generators)"
        )


def check_loss_scale(loss_scale: Any) -> None:
    """Checks that `loss_scale` is a number.

    Raises:
        TypeError: The value is not a number.
    """
    if isinstance(loss_scale, bool) or not isinstance(loss_scale, int | float | torch.Tensor):
        raise TypeError(f"loss_scale={loss_scale!r} is not a number; pass scaler.get_scale()")
