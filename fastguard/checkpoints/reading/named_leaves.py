"""Traverses the tree from `load_inert` and yields each leaf with its dotted path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.inert_values import Attached, InertDict, OpaqueKey, StandIn

_MODULE_PARTS = ("_parameters", "_buffers", "_modules")
_LONGEST_KEY = 200  # characters; longer keys are cut
_LONGEST_PATH = 1000
_DEEPEST = 500  # nested containers
_MAX_LEAVES = 3_000_000  # takes about 2 seconds; a container counts as several leaves
_CONTAINER = 3  # a container takes as long as this many leaves
_REPEATED = 2  # so does a container that was visited before
_PLAIN = frozenset({type(None), bool, int, str, bytes})  # types that have no NaN


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields every non-container in the tree with its path: `("ema.0.weight", TensorRef)`.

    Parameters, buffers and children of a pickled module have the names that `named_parameters`
    gives them. Each container is visited once, under the first path that leads to it. Items of
    lists and tuples are left out if they cannot be or contain NaN: text, integers, finite floats.

    Raises:
        DamagedFile: Containers are nested more than 500 deep, a path is over 1000 characters, or
            there are more than 3,000,000 leaves or 1,000,000 containers.
    """
    return ((path, leaf) for path, leaf, _ in owned_leaves(tree))


def owned_leaves(tree: Any) -> Iterator[tuple[str, Any, Sequence[Any]]]:
    """Like `named_leaves`, also yielding the containers around each leaf, outermost first.

    All items share one list object, which changes with the next leaf; copy the list to keep it.
    """
    entered = {id(tree)}
    owners: list[Any] = []
    children = _children(tree)
    if children is None:
        yield "", tree, owners
        return
    owners.append(tree)
    stack = [("", children)]
    n_left = _MAX_LEAVES
    while stack:
        path, children = stack[-1]
        found = next(children, None)
        if found is None:
            stack.pop()
            owners.pop()
            continue
        key, value = found
        below = f"{path}.{key}" if path and key else path or key
        children = _children(value)
        if children is None:
            n_left -= 1 + len(below) // _LONGEST_KEY
            yield below, value, owners
        elif id(value) in entered:
            n_left -= _REPEATED
        else:
            n_left -= _CONTAINER
            entered.add(id(value))
            if len(stack) > _DEEPEST or len(below) > _LONGEST_PATH:
                raise DamagedFile(
                    f"the containers are nested more than {_DEEPEST} deep, or their path has more "
                    f"than {_LONGEST_PATH} characters: {below[:60]}..."
                )
            stack.append((below, children))
            owners.append(value)
        if n_left < 0:
            raise DamagedFile(
                f"the file has more than {_MAX_LEAVES:,} values, or {_MAX_LEAVES // _CONTAINER:,} "
                "containers, too many for a checkpoint"
            )


Children = Iterator[tuple[str, Any]]


def _children(value: Any) -> Children | None:
    if isinstance(value, StandIn):
        return (child for part in value.parts for child in _parts(part))
    if isinstance(value, Attached):
        return iter([("", value.value), ("", value.state)])
    if isinstance(value, dict):
        own = _items(value)
        attributes = value.attributes if isinstance(value, InertDict) else ()
        return itertools.chain(own, (("", part) for part in attributes)) if attributes else own
    if isinstance(value, list | tuple | set):
        return ((str(i), child) for i, child in enumerate(value) if _may_be_nan(child))
    return None


def _may_be_nan(item: Any) -> bool:
    kind = type(item)
    return kind not in _PLAIN and (kind is not float or item != item)


def _items(value: dict[Any, Any]) -> Children:
    for key, child in dict.items(value):
        yield _text(key), child
        if isinstance(key, OpaqueKey) and key.tensor is not None:
            yield _text(key), key.tensor  # a pickled optimizer object has parameters as keys


def _parts(part: Any) -> Children:
    """Yields the attributes of a stand-in. A module's three dicts are left out of the paths."""
    if (
        isinstance(part, tuple)
        and len(part) == 2
        and all(p is None or isinstance(p, dict) for p in part)
    ):  # the state is (`__dict__`, slots)
        return (child for p in part if isinstance(p, dict) for child in _attributes(p))
    return _attributes(part) if isinstance(part, dict) else iter([("", part)])


def _attributes(part: dict[Any, Any]) -> Children:
    return (("" if key in _MODULE_PARTS else _text(key), child) for key, child in part.items())


def _text(key: Any) -> str:
    text = str(key)
    return text if len(text) <= _LONGEST_KEY else f"{text[:_LONGEST_KEY]}..."
