"""Converts objects to nested containers of tensors, and restores them.

Everything in a checkpoint must load with `torch.load(weights_only=True)`. The check is made when
saving, so that the error comes immediately and names the value ("scheduler.fn is a function").
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
    """Returns the states of the objects that have one, and the plain values.

    Args:
        objects: By name: anything with `state_dict()`, a `torch.Generator`, or plain data.

    Raises:
        TypeError: A value could not be loaded again with `weights_only=True`.
        ValueError: A tensor is on the meta device, where it has no data.
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
    """Returns `value.state_dict()`.

    Raises:
        RuntimeError, ValueError: `state_dict` failed; the message names the object.
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
    """Checks that each object has a saved state and can load it.

    Raises:
        CheckpointError: The state for an object is missing.
        TypeError: An object has no `load_state_dict`.
    """
    for name, value in objects.items():
        if not isinstance(value, torch.Generator) and not hasattr(value, "load_state_dict"):
            raise TypeError(
                f"{name}={value!r} has no load_state_dict; read it from checkpoint.state[{name!r}]"
            )
        if name not in states:
            raise CheckpointError(
                f"the checkpoint has no state for {name!r}, only for "
                f"{', '.join(map(repr, states)) or 'nothing'}"
            )


def restore(objects: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Restores the state of each object; call `check_restorable` first."""
    for name, value in objects.items():
        if isinstance(value, torch.Generator):
            value.set_state(states[name][_GENERATOR])
        else:
            value.load_state_dict(states[name])


def plain(value: Any, path: str) -> Any:
    """Returns the value with numpy scalars converted to Python numbers.

    Raises:
        TypeError: The value contains something other than tensors, plain values and containers.
        ValueError: A tensor has no data: it is on the meta device, lazy, or a placeholder.
    """
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            raise ValueError(
                f"{path} is on the meta device: it has a shape but no data to save; use "
                "model.to_empty(device=...) and initialize or load it first"
            )
        if not has_numbers(value):
            raise ValueError(
                f"{path} is a {type(value).__name__} under FakeTensorMode or a tracer, which has a "
                "shape but no data to save; do not save during memory estimation or tracing"
            )
        if is_lazy(value):
            raise ValueError(
                f"{path} belongs to a lazy module and has no data before its first forward pass; "
                "run a forward pass, or save later"
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
        same = all(checked[key] is item for key, item in value.items())
        # The original is kept: a module's OrderedDict has its versions in `_metadata`.
        return value if same and type(value) in (dict, OrderedDict) else checked
    if type(value) in (list, tuple, set):
        return type(value)(plain(item, f"{path}.{i}") for i, item in enumerate(value))
    raise TypeError(
        f"{path} is a {type(value).__qualname__}, which torch.load(weights_only=True) refuses; "
        "keep only tensors, numbers, strings and containers of them in the state"
        + (
            "; torch.from_numpy converts an array to a tensor"
            if isinstance(value, np.ndarray)
            else ""
        )
    )


def _check_subclass(value: Tensor, path: str) -> None:
    """Raises a TypeError for a tensor subclass that a later process would refuse to load."""
    kind = type(value)
    if not _is_registered(kind):
        raise TypeError(
            f"{path} is a {kind.__qualname__}, a tensor subclass that "
            "torch.load(weights_only=True) refuses; register the class where tensors are saved and "
            f"loaded: torch.serialization.add_safe_globals([{kind.__qualname__}])"
        )
    for name, item in vars(value).items():
        if not _is_registered(type(item)):
            plain(item, f"{path}.{name}")


def _is_registered(kind: type) -> bool:
    known = torch.serialization.get_safe_globals()
    return any((item[0] if isinstance(item, tuple) else item) is kind for item in known)
