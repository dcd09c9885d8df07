"""From living objects to plain nested containers of tensors, and back.

What goes into a checkpoint must come out of `torch.load(weights_only=True)`, so it is checked while
it can still be named: "scheduler.fn is a function" at save time, not a refusal three weeks later.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastguard.checkpoints.errors import CheckpointError
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.gradients.tensor_parts import has_plain_type
from fastguard.ranks.dtensors import is_dtensor

_PLAIN = (
    bool, int, float, complex, str, bytes, bytearray, type(None),
    torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_GENERATOR = "generator_state"


def gather(objects: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """States of the objects that have one, and the plain values among them.

    Args:
        objects: By name: anything with `state_dict()`, a `torch.Generator`, or plain data.

    Raises:
        TypeError: Something in them could not be loaded again with `weights_only=True`.
        ValueError: A tensor in them is on the meta device, where it has no data.
    """
    states, data = {}, {}
    for name, value in objects.items():
        if isinstance(value, torch.Generator):
            states[name] = {_GENERATOR: value.get_state()}
        elif callable(getattr(value, "state_dict", None)):
            states[name] = plain(state_of(value, name), name)
        else:
            data[name] = plain(value, name)
    return states, data


def state_of(value: Any, name: str) -> Any:
    """What `value.state_dict()` returns.

    Raises:
        RuntimeError, ValueError: It cannot say; the error names the object.
    """
    try:
        return value.state_dict()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        inside = f" around {type(value.optimizer).__name__}" if hasattr(value, "optimizer") else ""
        kind = RuntimeError if isinstance(error, RuntimeError) else ValueError
        raise kind(
            f"the state of {name!r} cannot be saved: {type(value).__name__}{inside}.state_dict() "
            f"raised {error!r}"
        ) from error


def check_restorable(objects: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Raises unless there is a state for each object, and each object takes one.

    Raises:
        CheckpointError: There is no state for one of them.
        TypeError: One of them cannot be given a state.
    """
    for name, value in objects.items():
        if not isinstance(value, torch.Generator) and not hasattr(value, "load_state_dict"):
            raise TypeError(
                f"{name}={value!r} has no load_state_dict; read it from checkpoint.state[{name!r}]"
            )
        if name not in states:
            raise CheckpointError(
                f"the checkpoint holds no state of {name!r}, only of "
                f"{', '.join(map(repr, states)) or 'nothing'}"
            )


def restore(objects: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Gives each object its state; `check_restorable` comes first."""
    for name, value in objects.items():
        if isinstance(value, torch.Generator):
            value.set_state(states[name][_GENERATOR])
        else:
            value.load_state_dict(states[name])


def plain(value: Any, path: str) -> Any:
    """The same value, numpy scalars as Python numbers.

    Raises:
        TypeError: Something in it is no tensor, no plain value and no container of such.
        ValueError: A tensor in it has no data: on the meta device, lazy, or a placeholder.
    """
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            raise ValueError(
                f"{path} is on the meta device: it has a shape and no data to save; use "
                "model.to_empty(device=...) and initialise or load it first"
            )
        if not has_numbers(value):
            raise ValueError(
                f"{path} is a {type(value).__name__} under FakeTensorMode or a tracer, which has a "
                "shape and no data to save; leave saving out of memory estimation and tracing"
            )
        if is_lazy(value):
            raise ValueError(
                f"{path} belongs to a lazy module and has no data before its first forward pass; "
                "run one, or save later"
            )
        if not (has_plain_type(value) or is_dtensor(value)):
            _check_subclass(value, path)
        return value
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Counter):
        return value
    if isinstance(value, Mapping):
        checked = {key: plain(item, f"{path}.{key}") for key, item in value.items()}
        same = type(value) in (dict, OrderedDict) and all(
            checked[key] is item for key, item in value.items()
        )  # then keep it: the OrderedDict of a module carries its versions in `_metadata`
        return value if same else checked
    if type(value) in (list, tuple, set):
        return type(value)(plain(item, f"{path}.{i}") for i, item in enumerate(value))
    raise TypeError(
        f"{path} is a {type(value).__qualname__}, which torch.load(weights_only=True) refuses: "
        "keep tensors, numbers, strings and containers of them in the state"
        + ("; torch.from_numpy makes an array a tensor" if isinstance(value, np.ndarray) else "")
    )


def _check_subclass(value: Tensor, path: str) -> None:
    """Raises a TypeError for a tensor whose class a later process would refuse to load."""
    kind = type(value)
    if not _is_registered(kind):
        raise TypeError(
            f"{path} is a {kind.__qualname__}, a tensor subclass that "
            "torch.load(weights_only=True) refuses; register it, here and where it is loaded: "
            f"torch.serialization.add_safe_globals([{kind.__qualname__}])"
        )
    for name, item in vars(value).items():
        if not _is_registered(type(item)):
            plain(item, f"{path}.{name}")


def _is_registered(kind: type) -> bool:
    known = torch.serialization.get_safe_globals()
    return any((item[0] if isinstance(item, tuple) else item) is kind for item in known)
