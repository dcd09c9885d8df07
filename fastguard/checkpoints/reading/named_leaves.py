"""Walking the tree that `inert.load_inert` gives: each leaf with the path that a user knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastguard.checkpoints.reading.inert_unpickler import Attached, StandIn

_MODULE_PARTS = ("_parameters", "_buffers", "_modules")


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Everything in the tree that is no container, with its path: `("ema.0.weight", TensorRef)`.

    Parameters, buffers and children of a pickled module appear under the names that
    `named_parameters` gives them. Each container is entered once, under its first path.
    """
    entered: set[int] = set()
    stack: list[tuple[str, Any]] = [("", tree)]
    while stack:
        path, value = stack.pop()
        children = _children(value)
        if children is None:
            yield path, value
        elif id(value) not in entered:
            entered.add(id(value))
            stack.extend(
                (f"{path}.{key}" if path and key else path or key, child)
                for key, child in reversed(children)
            )


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, StandIn):
        return [child for part in value.parts for child in _parts(part)]
    if isinstance(value, Attached):
        return [("", value.value), ("", value.state)]
    if isinstance(value, dict):
        return [(str(key), child) for key, child in dict.items(value)]
    if isinstance(value, list | tuple | set):
        return [(str(i), child) for i, child in enumerate(value)]
    return None


def _parts(part: Any) -> list[tuple[str, Any]]:
    """The attributes of a stand-in; the three dicts of a module add nothing to the path."""
    if (
        isinstance(part, tuple)
        and len(part) == 2
        and all(p is None or isinstance(p, dict) for p in part)
    ):  # (`__dict__`, slots)
        return [child for p in part if p is not None for child in _parts(p)]
    if not isinstance(part, dict):
        return [("", part)]
    return [("" if key in _MODULE_PARTS else str(key), child) for key, child in part.items()]
