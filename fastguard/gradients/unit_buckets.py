"""Pairs gradients with their weights, divided into units, for adaptive gradient clipping.

A unit is the set of weights of one output of a layer. A tensor with two or more dimensions has one
unit per index of its first dimension (a row of a linear layer, a filter of a convolution); a vector
or a scalar is one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from fastguard.gradients.buckets import BucketMemo, GradBucket, bucketize, name_of
from fastguard.gradients.tensor_kinds import PLAIN, PLAIN_TYPES, is_wrapped
from fastguard.ranks.dtensors import dtensor_types
from fastguard.ranks.plain_shards import engine_of, is_managed


@dataclass(frozen=True)
class UnitBucket:
    """Gradients of one device and dtype, with weights of one dtype.

    Attributes:
        bucket: The gradients; `tensor_ids` are indices in the caller's list.
        weights: The weight of each gradient, as a dense real tensor on the same device.
        counts: Number of units of each gradient; 0 for a tensor without elements.
    """

    bucket: GradBucket
    weights: list[Tensor]
    counts: list[int]

    @cached_property
    def starts(self) -> list[int]:
        """Index of the first unit of each tensor among all U units; the last entry is U."""
        return list(accumulate(self.counts, initial=0))

    @property
    def device(self) -> torch.device:
        return self.bucket.device


def n_units(weight: Tensor) -> int:
    """Returns the number of units of a weight; 0 if it is empty."""
    shape = weight.shape
    if 0 in shape:
        return 0
    return shape[0] if len(shape) > 1 else 1


def has_rows(weight: Tensor) -> bool:
    """Whether the units of a weight are consecutive in memory, as in a dense copy."""
    if weight.is_contiguous() or weight.dim() < 2 or len(weight) < 2:
        return True
    inner = zip(weight.stride()[1:], weight.shape[1:], strict=True)
    return weight.stride(0) > max((stride for stride, size in inner if size > 1), default=0)


def unit_buckets(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    names: Sequence[str] | None,
    norm_type: float = 2.0,
) -> list[UnitBucket]:
    """Sorts gradients and their weights into buckets.

    Args:
        grads: One entry per tensor; None if there is no gradient.
        weights: The weight of each gradient.
        names: The name of each weight, or None.
        norm_type: The norm that will be computed; must be 2 for complex gradients. Default: 2.

    Raises:
        TypeError: A tensor is a DTensor, a weight with a plain gradient wraps other tensors, or
            `bucketize` does not accept a gradient.
    """
    are_plain = PLAIN_TYPES.issuperset(map(type, weights))
    if not are_plain:
        refuse_dtensors(weights, names)
    units = []
    for bucket in bucketize(grads, names=names, norm_type=norm_type).buckets:
        own = [weights[i].detach() for i in bucket.tensor_ids]
        if bucket.kind is PLAIN and not are_plain:
            _refuse_wrapped([(i, weights[i]) for i in bucket.tensor_ids], names)
        dtypes = list(dict.fromkeys(w.dtype for w in own))
        for dtype in dtypes:
            part, members = bucket, own
            if len(dtypes) > 1:
                places = [i for i, w in enumerate(own) if w.dtype is dtype]
                part, members = _part(bucket, places), [own[i] for i in places]
            real = [_as_real(w) for w in members] if dtype.is_complex else members
            units.append(UnitBucket(part, real, list(map(n_units, members))))
    return units


def _refuse_wrapped(weights: list[tuple[int, Tensor]], names: Sequence[str] | None) -> None:
    """Raises a TypeError that names the first weight that wraps other tensors."""
    for i, weight in weights:
        if is_wrapped(weight):
            raise TypeError(
                f"{name_of(i, names)} is a {type(weight).__name__}, whose units cannot be "
                f"read; {_REMEDY}"
            )


def _part(bucket: GradBucket, places: Sequence[int]) -> GradBucket:
    return replace(
        bucket,
        grads=[bucket.grads[i] for i in places],
        tensor_ids=[bucket.tensor_ids[i] for i in places],
        segment_ids=[bucket.segment_ids[i] for i in places],
        runs=None,
        memo=BucketMemo(),
        form=None,
        sizes=None,
    )


def _as_real(weight: Tensor) -> Tensor:
    return torch.view_as_real(weight.resolve_conj().resolve_neg())


def refuse_shards(weights: Sequence[Tensor], names: Sequence[str] | None) -> None:
    """Raises an error for DTensors, and for tensors that FSDP1 or DeepSpeed has split or flattened.

    Raises:
        TypeError: One of the tensors is of this kind; the message names it.
    """
    refuse_dtensors(weights, names)
    engine = engine_of(weights)
    if engine is not None:
        i = next(i for i, w in enumerate(weights) if is_managed(w))
        raise TypeError(
            f"{name_of(i, names)} is a part of a flat tensor of {engine}, in which units cannot "
            f"be distinguished; {_REMEDY}"
        )


def refuse_dtensors(weights: Sequence[Tensor], names: Sequence[str] | None) -> None:
    """Raises a TypeError that names the first DTensor."""
    known = dtensor_types(set(map(type, weights)))
    if not known:
        return
    i = next(i for i, w in enumerate(weights) if isinstance(w, known))
    raise TypeError(
        f"{name_of(i, names)} is a DTensor: a shard may contain only a part of a unit, whose norm "
        f"this rank cannot compute; {_REMEDY}"
    )


_REMEDY = (
    "adaptive gradient clipping does not support such parameters; use another limit, such as "
    "max_norm=1.0, or exclude this parameter"
)
