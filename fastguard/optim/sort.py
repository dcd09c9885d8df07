"""Sorts parameters and their state into buckets, one `Update` for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastguard.errors.checked_numbers import number_of
from fastguard.gradients.transfer import moved, numbers_on
from fastguard.gradients.unit_buckets import n_units
from fastguard.optim.contract import HYPER, STATISTICS, Update
from fastguard.optim.options import is_spike_aware, state_dtype_of
from fastguard.optim.orders import Orders
from fastguard.optim.statistics import UpdateStatistics
from fastguard.ranks.dtensors import dtensor_types, local_parts

if TYPE_CHECKING:
    from fastguard.optim.optimizer import FusedOptimizer

STEP = "step"


def check_gradients(optimizer: FusedOptimizer) -> None:
    """Raises a TypeError for a gradient that is sparse or not of a supported dtype."""
    for g, group in enumerate(optimizer.param_groups):
        grads = [p.grad for p in group["params"]]
        present = [grad for grad in grads if grad is not None]
        if _LAYOUT >= set(map(_layout, present)) and _SERVED >= set(map(_dtype, present)):
            continue
        i, grad = next((i, t) for i, t in enumerate(grads) if t is not None and not _is_served(t))
        what = grad.dtype if grad.layout is torch.strided else f"sparse ({grad.layout})"
        raise TypeError(
            f"the gradient of parameter {i} of param group {g} is {what}; fastguard.optim "
            "requires dense real gradients; use sparse=False in the embedding, or an optimizer of "
            "torch.optim for this parameter"
        )


def _is_served(grad: Tensor) -> bool:
    return grad.layout is torch.strided and grad.dtype in _SERVED


_LAYOUT = {torch.strided}
_layout, _dtype = attrgetter("layout"), attrgetter("dtype")
_SERVED = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


class _Key(NamedTuple):
    """The common properties of the tensors in a bucket."""

    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtype: torch.dtype
    states: tuple[str, ...]
    counted: bool
    master: Any
    rounding: Any
    amsgrad: bool
    nesterov: bool
    reproducible: bool
    spike_aware: bool
    update_clipping: bool


@dataclass(slots=True)
class _Bucket:
    parameters: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[Mapping[str, Any]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    counters: list[int] = field(default_factory=list)
    unit_counts: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


def updates_of(
    optimizer: FusedOptimizer, orders: Orders, collected: Sequence[UpdateStatistics] = ()
) -> Iterator[Update]:
    """Yields the updates of one step; missing state is initialized as in torch.

    Args:
        optimizer: The optimizer.
        orders: The verdict.
        collected: Receives the statistics of the updates. Default: None, no statistics.
    """
    buckets: dict[_Key, _Bucket] = {}
    position = first = 0
    states = optimizer.state
    for g, group in enumerate(optimizer.param_groups):
        names, counted = optimizer.state_names(group), optimizer.counts_steps(group)
        n_entries = len(names) + counted + (group["master"] is not None)
        options = (
            group["master"],
            group["rounding"],
            bool(group.get("amsgrad")),
            bool(group.get("nesterov")),
            group["reproducible"],
            is_spike_aware(group),
            bool(group.get("update_clipping")),
        )
        of_group: dict[tuple[torch.device, torch.dtype, torch.dtype], _Bucket] = {}
        for p in group["params"]:
            grad, at, counter = p.grad, position, first
            position, first = position + 1, (first + p.numel()) & 0xFFFFFFFF
            if grad is None:
                continue
            state = states[p]
            if len(state) < n_entries:
                _complete(state, p, group, names, counted)
            kind = p.device, p.dtype, grad.dtype
            bucket = of_group.get(kind)
            if bucket is None:
                key = _Key(*kind, state_dtype_of(group, p), names, counted, *options)
                bucket = of_group[kind] = buckets.setdefault(key, _Bucket())
            bucket.parameters.append(p)
            bucket.grads.append(grad)
            bucket.states.append(state)
            bucket.groups.append(g)
            bucket.segments.append(0 if orders.segments is None else orders.segments[at])
            bucket.counters.append(counter)
            if orders.units is not None:
                bucket.unit_counts.append(n_units(p) if orders.units.limited[at] else 0)
                bucket.positions.append(at)
    rows = _hyper_rows(optimizer)
    for key, bucket in buckets.items():
        statistics = None
        if collected:
            shape = len(bucket.parameters), len(STATISTICS)
            statistics = torch.zeros(shape, dtype=torch.float64, device=key.device)
            for one in collected:
                one.add(bucket.parameters, statistics)
        yield _update(optimizer, key, bucket, orders, _hyper(rows, key.device), statistics)


def _complete(
    state: dict[str, Any],
    p: Tensor,
    group: Mapping[str, Any],
    names: Sequence[str],
    counted: bool,
) -> None:
    """Adds the missing entries to the state of a parameter, in torch's order."""
    if counted and STEP not in state:
        # A momentum buffer without a step count comes from torch's SGD, which creates the buffer in
        # the first step.
        begun = 1.0 if any(name in state for name in names) else 0.0
        state[STEP] = torch.full((), begun, dtype=torch.float32, device=p.device)
    for name in names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(p, dtype=state_dtype_of(group, p))
    if group["master"] == "float32" and "master" not in state:
        state["master"] = p.detach().to(torch.float32, copy=True)
    if group["master"] == "remainder" and "remainder" not in state:
        state["remainder"] = torch.zeros_like(p, dtype=torch.int16)


MASTER_KEYS = {"float32": "master", "remainder": "remainder"}


def _update(
    optimizer: FusedOptimizer,
    key: _Key,
    bucket: _Bucket,
    orders: Orders,
    hyper: Tensor,
    statistics: Tensor | None,
) -> Update:
    def local(tensors: list[Tensor]) -> list[Tensor]:
        return local_parts(tensors) if wrapped else tensors

    wrapped = bool(dtensor_types(set(map(type, bucket.parameters))))
    master = key.master
    masters = [] if master is None else [state[MASTER_KEYS[master]] for state in bucket.states]
    return Update(
        optimizer.algorithm,
        local(bucket.parameters),
        local(bucket.grads),
        {name: local([state[name] for state in bucket.states]) for name in key.states},
        [state[STEP] for state in bucket.states] if key.counted else [],
        hyper,
        bucket.groups,
        moved(orders.multiplier, key.device),
        bucket.segments,
        moved(orders.found_inf, key.device),
        moved(orders.clean, key.device),
        master,
        local(masters),
        key.rounding,
        bucket.counters if key.rounding == "stochastic" else (),
        key.amsgrad,
        key.nesterov,
        key.reproducible,
        key.spike_aware,
        key.update_clipping,
        orders.units,
        bucket.unit_counts,
        bucket.positions,
        statistics,
    )


def _hyper_rows(optimizer: FusedOptimizer) -> list[list[Any]]:
    rows = []
    for group in optimizer.param_groups:
        values = optimizer.hyper(group)
        values["sign"] = -1.0 if group["maximize"] else 1.0
        values["seed"] = float(group["seed"])
        rows.append([values.get(name, 0.0) for name in HYPER])
    return rows


def _hyper(rows: list[list[Any]], device: torch.device) -> Tensor:
    """Returns hyper-parameters as float64 `(G, 12)` on a device, without a sync for tensors."""
    flat = [_number(n, v) for row in rows for n, v in zip(HYPER, row, strict=True)]
    hyper = numbers_on(flat, device).reshape(len(rows), len(HYPER))
    for g, row in enumerate(rows):
        for column, value in enumerate(row):
            if isinstance(value, Tensor):
                hyper[g, column] = moved(value.detach().reshape(()), device)
    return hyper


def _number(name: str, value: Any) -> float:
    """Returns a hyper-parameter, which user code may have replaced, as a number; 0 for a tensor."""
    if type(value) is float:  # a fast path for the usual case
        return value
    return 0.0 if isinstance(value, Tensor) else number_of(name, value)
