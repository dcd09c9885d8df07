"""Copies and compares what an optimizer holds in Python: containers and small objects.

A trace runs the step on a copy. Containers and objects are copied down to their values, so that
the step can write placeholders into them without changing the original. A comparison of the copy
with its earlier contents then shows whether the step has written into the copy.
"""

from __future__ import annotations

import copy
import operator
from collections import deque
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

SHARED = (Tensor, nn.Module, Optimizer, type)
"""Kinds of objects that are never copied."""


def is_container(value: object) -> bool:
    """Whether a value is a list, dict, set, tuple or deque."""
    return isinstance(value, list | dict | set | tuple | deque)


def is_object(value: object) -> bool:
    """Whether a value is an object that holds values in attributes."""
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, SHARED)


def copied(value: Any, objects: bool = True, known: dict[int, Any] | None = None) -> Any:
    """Returns a copy of containers and objects at any depth; all other values are shared.

    Args:
        value: The value.
        objects: Whether objects are copied too, not only containers.
        known: Copies made so far, by the `id` of the original.
    """
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, tuple):
        items = [copied(item, objects, known) for item in value]
        if all(map(operator.is_, items, value)):  # keeps the type of a torch.Size
            return value
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if not is_container(value) and not (objects and is_object(value)):
        return value
    new = known[id(value)] = copy.copy(value)
    if new is value:  # copy.copy returns some objects unchanged, such as loggers
        return value
    if isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(new, key, copied(item, objects, known))
    elif isinstance(value, list | deque):
        for i, item in enumerate(value):
            new[i] = copied(item, objects, known)
    elif not isinstance(value, set):
        for key, item in vars(value).items():
            vars(new)[key] = copied(item, objects, known)
    return new


def same(a: Any, b: Any, depth: int = 0) -> bool:
    """Whether a value equals a copy made by `copied`.

    Tensors and other shared values must be the same object. Numbers and strings must be equal, and
    NaN equals nothing. Values nested more than 20 levels deep count as different.
    """
    if a is b:
        return True
    if type(a) is not type(b) or depth > 20:
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k], depth + 1) for k, v in a.items())
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b, [depth + 1] * len(a)))
    if isinstance(a, set | int | float | str | bytes | complex):
        return bool(a == b)
    return is_object(a) and same(vars(a), vars(b), depth + 1)
