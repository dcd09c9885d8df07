"""Decides which infinities in a checkpoint are intended, such as an initial best loss or a mask.

NaN is never intended, except under the mask of a `torch.masked.MaskedTensor`, nor is Inf in a
parameter or in optimizer state. For all other tensors, the position in the file, the values and the
name decide:

* **Bookkeeping**: a number stored beside the weights, not among them, such as the `best_score` of
  early stopping or the `kth_value` of a checkpoint callback.
* **Nothing observed yet**: a minimum whose elements are all +Inf, or a maximum whose elements are
  all -Inf, as in the observers of a model to be quantized; also bounds, `low` at -Inf or `high` at
  +Inf.
* **A mask**: -Inf in a triangle or in bands, which no optimizer step produces, or any pattern of
  -Inf and 0 in a tensor whose name says mask.

All other infinities count as bad; the user can exclude tensors with `--ignore`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from fastguard.checkpoints.reading.inert_values import StandIn, TensorRef
from fastguard.checkpoints.reading.mask_pattern import is_banded, is_finite_under, is_two_valued
from fastguard.checkpoints.reading.named_leaves import owned_leaves
from fastguard.checkpoints.reading.pickled_arrays import NumpyArray
from fastguard.checkpoints.reading.spans import Contents, Span

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_MINIMUM, _MAXIMUM = frozenset({"min", "minimum", "lowest"}), frozenset({"max", "maximum"})
_LOW, _HIGH = frozenset({"low", "lower"}), frozenset({"high", "upper"})
_BOUND = frozenset({"bound", "bounds", "limit", "limits"})
_BEST = frozenset({"best", "worst", "kth", "score", "loss", "metric", "fitness", "monitor"})
_NUMBERS = _MINIMUM | _MAXIMUM | _LOW | _HIGH | _BOUND | _BEST
_KEEPERS = frozenset({"callback", "callbacks", "stopping", "metrics", "meters", "history"})
_MASK = frozenset({"mask", "masks", "masked", "inf"})
_PARAMETER = frozenset({"weight", "weights", "token", "embed", "embedding", "proj"})
# a run cannot continue if these values are infinite
_NEVER = _PARAMETER | {"scale", "scaler", "lr", "step", "momentum"}
_OPTIMIZER = frozenset({"optimizer", "optimizers", "optim"})

_MAX_TENSORS = 1000  # a limit, since each tensor is examined together with its neighbors

BOOKKEEPING = "bookkeeping beside the weights"
EXTREME = "a bound, or a minimum or maximum before any observation"
MASK = "a mask"
MASKED = "values under a mask"
_DATA_KEY, _MASK_KEY = "_masked_data", "_masked_mask"  # attributes of a MaskedTensor


@dataclass(frozen=True, slots=True)
class _Place:
    """The position of a tensor in the tree.

    Attributes:
        name: The path of the tensor.
        n: Number of elements.
        words: Words in the last part of its name, in lower case.
        is_trained: Whether the tensor is a parameter or belongs to an optimizer.
        among_weights: Whether the tensor is in a state dict or a module.
        is_kept: Whether the tensor's container has numbers and text, but no weights.
    """

    name: str
    n: int
    words: Collection[str]
    is_trained: bool
    among_weights: bool
    is_kept: bool


def meant_infinite(
    file: BinaryIO, contents: Contents, counts: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Returns the tensors whose infinities are intended: the reason by name.

    Args:
        file: The open file; possible masks are read again.
        contents: The contents of the file.
        counts: Numbers of NaN, +Inf and -Inf by tensor name.
    """
    spans = {span.name: span for span in contents.spans}
    left_to_read = max((span.end for span in contents.spans), default=0)
    found: dict[str, str] = {}
    for name in counts:
        mask = spans.get(name.removesuffix(_DATA_KEY) + _MASK_KEY)
        if name.endswith(_DATA_KEY) and name in spans and mask is not None:
            left_to_read -= spans[name].n * spans[name].dtype.itemsize
            if left_to_read >= 0 and is_finite_under(file, spans[name], mask):
                found[name] = MASKED
    asked = {name for name, (nan, pos, neg) in counts.items() if not nan and bool(pos) != bool(neg)}
    if not asked or len(asked) > _MAX_TENSORS or contents.tree is None:
        return found
    for place in _places(contents.tree, asked):
        _, pos, neg = counts[place.name]
        if place.is_trained:
            continue
        if _is_bookkeeping(place):
            found[place.name] = BOOKKEEPING
        elif _is_extreme(place, pos, neg):
            found[place.name] = EXTREME
        elif neg and place.name in spans:
            span = spans[place.name]
            # views of the same bytes count several times
            left_to_read -= span.n * span.dtype.itemsize
            if left_to_read >= 0 and _is_mask(file, span, place.words):
                found[place.name] = MASK
    return found


def _is_bookkeeping(place: _Place) -> bool:
    if place.among_weights or _NEVER & set(place.words):
        return False
    return bool(_NUMBERS & set(place.words)) or (place.n == 1 and place.is_kept)


def _is_extreme(place: _Place, pos: int, neg: int) -> bool:
    words = set(place.words)
    if pos + neg < place.n or _PARAMETER & words:
        return False
    return bool(words & _BOUND or words & (_MINIMUM | _HIGH if pos else _MAXIMUM | _LOW))


def _is_mask(file: BinaryIO, span: Span, words: Collection[str]) -> bool:
    named = bool(_MASK & set(words)) and not _PARAMETER & set(words)
    return is_banded(file, span) or (named and is_two_valued(file, span))


def _places(tree: Any, names: Collection[str]) -> Iterator[_Place]:
    """Yields the positions of some tensors; skips names that several tensors share."""
    places: dict[str, _Place | None] = {}
    holders: dict[int, _Holder] = {}
    for name, leaf, owners in owned_leaves(tree):
        if name in names and _n_elements(leaf):
            for owner in owners:
                if id(owner) not in holders:
                    holders[id(owner)] = _holder(owner)
            known = [holders[id(owner)] for owner in owners]
            places[name] = None if name in places else _place(name, leaf, owners, known)
    return (place for place in places.values() if place is not None)


@dataclass(frozen=True, slots=True)
class _Holder:
    """The named values in a container (none in a list).

    Attributes:
        parts: Values by name.
        has_numbers: Whether the values include numbers and text.
        n_weights: Number of tensors with several elements.
    """

    parts: Mapping[Any, Any]
    has_numbers: bool
    n_weights: int


def _holder(owner: Any) -> _Holder:
    parts: dict[Any, Any] = {}
    if isinstance(owner, dict):
        parts = owner
    for part in owner.parts if isinstance(owner, StandIn) else ():
        # the state is (`__dict__`, slots)
        for state in part if isinstance(part, tuple) else (part,):
            if isinstance(state, dict):
                parts.update(dict.items(state))
    values = list(dict.values(parts))
    return _Holder(
        parts,
        has_numbers=any(isinstance(value, str | int | float) for value in values),
        n_weights=sum(_n_elements(value) > 1 for value in values),
    )


def _place(name: str, leaf: Any, owners: Sequence[Any], known: Sequence[_Holder]) -> _Place:
    above, _, last = name.rpartition(".")
    path = _words(above)
    n = _n_elements(leaf)
    holder = next((found for found in reversed(known) if found.parts), None)
    numbers = holder is not None and holder.has_numbers
    stands_in_it = holder is known[-1] if known else False
    weights = holder is not None and holder.n_weights > (n > 1 and stands_in_it)
    pairs = list(zip(known, owners[1:], strict=False))
    is_parameter = any(found.parts.get("_parameters") is below for found, below in pairs)
    is_buffer = any(found.parts.get("_buffers") is below for found, below in pairs)
    return _Place(
        name,
        n,
        _words(last),
        is_trained=is_parameter
        or bool(_OPTIMIZER & path)
        or any({"state", "param_groups"} <= found.parts.keys() for found in known),
        among_weights=is_buffer or (weights and not numbers),
        is_kept=(numbers and not weights) or bool(_KEEPERS & path),
    )


def _n_elements(leaf: Any) -> int:
    """Returns the number of elements of a tensor; 0 for anything else."""
    if isinstance(leaf, TensorRef | Span):
        return math.prod(leaf.size)
    return math.prod(leaf.shape) if isinstance(leaf, NumpyArray) else 0


def _words(name: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(name))
