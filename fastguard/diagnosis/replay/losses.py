"""Extracts the loss from a step's result: `loss_parts`, `total_of`, and `number_in`.

Steps return a tensor, a dict of parts whose sum is the loss, an object with a `loss` as in
Transformers and Lightning, or a tuple that contains the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from fastguard.diagnosis.replay.calls import floats


def loss_parts(result: Any) -> dict[str, Tensor]:
    """Returns the scalar losses in a step's result, by name; empty if there are none.

    If a mapping or an object has a `loss`, its other values are ignored, since they are meant for
    logging. In a tuple, the loss is the first entry, or else the only scalar: `(logits, loss)`.
    """
    if _is_scalar(result):
        return {"loss": result}
    if isinstance(result, Mapping) and "loss" not in result:
        parts = {str(k): v for k, v in result.items() if _is_scalar(v)}
        return parts if len(parts) == len(result) else {}
    loss = carried_loss(result)
    if loss is not None:
        return loss_parts(loss)
    if isinstance(result, list | tuple) and result:
        if _is_scalar(result[0]) or isinstance(result[0], Mapping):
            return loss_parts(result[0])
        scalars = [x for x in result if _is_scalar(x) and not x.ndim]
        return {"loss": scalars[0]} if len(scalars) == 1 else {}
    return {}


def carried_loss(result: Any) -> Any:
    """Returns the `loss` of a mapping or an object; None if there is none."""
    if isinstance(result, Mapping):
        return result.get("loss")
    if isinstance(result, Tensor | torch.nn.Module) or isinstance(result, type):
        return None
    loss = getattr(result, "loss", None)
    return None if callable(loss) and not isinstance(loss, Tensor) else loss


def total_of(result: Any) -> Tensor | None:
    """Returns the loss for the backward pass: the sum of the parts, or the mean of a non-scalar.

    Parts without a graph, such as an accuracy, are left out, since training cannot reduce them.
    """
    parts = list(loss_parts(result).values())
    if parts:
        counted = [part for part in parts if part.requires_grad] or parts
        return torch.stack([part.float().reshape(()) for part in counted]).sum()
    if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
        return result.float().mean()
    return None


def number_in(result: Any) -> str:
    """Describes a loss that is a plain number without a graph; empty for any other result."""
    if isinstance(result, list | tuple) and result:
        inside = number_in(result[0])
        return f"{inside} in a {type(result).__name__}" if inside else ""
    loss = carried_loss(result)
    if loss is not None and not isinstance(loss, Tensor):
        inside = number_in(loss)
        return f"{inside} in a {type(result).__name__}" if inside else ""
    if isinstance(result, Mapping):
        values = list(result.values())
        if values and all(number_in(v) or _is_scalar(v) for v in values):
            inside = next((found for v in values if (found := number_in(v))), "")
            return f"{inside} in a {type(result).__name__}" if inside else ""
        return ""
    is_array = type(result).__module__ == "numpy" and getattr(result, "size", 0) == 1
    is_number = isinstance(result, Number) and not isinstance(result, bool)
    return f"a {type(result).__name__}" if is_array or is_number else ""


def _is_scalar(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() == 1 and bool(floats(x))
