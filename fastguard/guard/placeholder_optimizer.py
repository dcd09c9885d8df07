"""A copy of an optimizer with placeholders instead of tensors, whose step can be traced.

After the step, the copy reports what has changed: tensors, whose writes can be masked; Python
numbers such as step counters, which must become tensors first; or anything else, which cannot be
masked.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from fastguard.guard.held_values import copied, is_container, is_object, same
from fastguard.guard.inner_step import steps_as_torch
from fastguard.guard.tensor_settings import (
    WritesRealTensor,
)

NUMBERS = (int, float)


class Place(NamedTuple):
    """The location of a number or tensor in an optimizer.

    Attributes:
        owner: The index of a param group, or of a parameter in `Members.params`.
        key: The name of the entry.
        of_group: Whether it is a setting of a param group; False for the state of a parameter.
        item: The position in a tuple such as `betas`; None: the entry itself.
    """

    owner: int
    key: str
    of_group: bool = True
    item: int | None = None

    def value_in(self, settings: Mapping[str, Any]) -> Any:
        """Returns the value at this location."""
        value = settings[self.key]
        return value if self.item is None else value[self.item]


class NotTraceable(Exception):
    """The update of an optimizer cannot be compiled; the message gives the reason."""


class CreatesState(Exception):
    """The step would create state, which has no previous value to keep if the step is skipped."""


class CountsInPython(Exception):
    """The step changes Python numbers, such as step counters.

    Args:
        places: The locations of these numbers.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        super().__init__(places)
        self.places = places


@dataclass(frozen=True, slots=True)
class Members:
    """The parameters of an update, and their state.

    Attributes:
        params: The parameters with a gradient.
        groups: The index of each parameter's group.
        segments: The index of each parameter's clip coefficient.
        states: The names of each parameter's state tensors.
        has_constants: Whether states have entries that are not tensors; the graph treats them as
            constants.
    """

    params: list[Tensor]
    groups: list[int]
    segments: list[int]
    states: list[tuple[str, ...]]
    has_constants: bool = False

    @staticmethod
    def of(
        optimizer: Optimizer, params: list[Tensor], groups: list[int], segments: list[int]
    ) -> Members:
        """Returns the members for these parameters, with the current state of the optimizer."""
        states = [
            tuple(k for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor))
            for p in params
        ]
        kept = [len(optimizer.state.get(p, ())) for p in params]
        return Members(params, groups, segments, states, kept != list(map(len, states)))

    def inputs(self, optimizer: Optimizer) -> list[Tensor]:
        """Returns parameters, gradients and state tensors, in the order of the graph's inputs.

        Raises:
            KeyError: A state tensor of the graph no longer exists.
        """
        state = optimizer.state
        inputs: list[Any] = [*self.params, *[p.grad for p in self.params]]
        for p, keys in zip(self.params, self.states, strict=True):
            of_p = state[p] if keys else {}
            inputs += [of_p[key] for key in keys]
        return inputs


class OptimizerOfPlaceholders:
    """A copy of an optimizer with placeholders instead of tensors.

    Args:
        optimizer: The original.
        members: The parameters to update.
        weights: Placeholders for the parameters.
        states: Placeholders for the state tensors of each parameter.
        settings: Placeholders for the settings that are inputs.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        members: Members,
        weights: list[Tensor],
        states: list[dict[str, Tensor]],
        settings: Mapping[Place, Tensor],
    ) -> None:
        self.read: list[set[str]] = [set() for _ in optimizer.param_groups]
        on_gpu = weights[0].device.type != "cpu"
        self.groups: list[_ReadRecorder] = []
        for i, group in enumerate(optimizer.param_groups):
            params = [w for w, g in zip(weights, members.groups, strict=True) if g == i]
            own = {**_with_tensors(_own(group), i, settings), "params": params}
            own.update((k, v) for k, v in _implementation(optimizer, on_gpu) if k in group)
            self.groups.append(_ReadRecorder(own, self.read[i]))
        self.states: list[dict[str, Any]] = [
            {**copied(optimizer.state.get(p, {})), **tensors}
            for p, tensors in zip(members.params, states, strict=True)
        ]
        self._before_groups = [_own(group) for group in self.groups]
        self._before_states = [copied(state) for state in self.states]
        self._settings = settings
        self.optimizer: Optimizer = object.__new__(type(optimizer))
        stand_in = self.optimizer
        attributes = {
            k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")
        }
        stand_in.__dict__.update(copied(attributes, objects=False))
        stand_in.__dict__.pop("step", None)  # a scheduler's `step` is bound to the original
        stand_in.param_groups = self.groups  # type: ignore[assignment]
        stand_in.state = defaultdict(dict, zip(weights, self.states, strict=True))  # type: ignore[arg-type]
        self._before_self = {
            k: copied(v, objects=False)
            for k, v in vars(stand_in).items()
            if k in attributes and (type(v) in NUMBERS or is_container(v))
        }

    def step(self) -> None:
        """Runs the step without torch's wrappers."""
        try:
            inspect.unwrap(type(self.optimizer).step)(self.optimizer)
        except Exception as error:
            raise NotTraceable(_untraceable_line(self.optimizer, error)) from error

    def after(self, written: Sequence[Tensor], versions: Iterable[int]) -> Iterator[Tensor | None]:
        """Returns the value of each tensor after the step, or None if it was not changed.

        Args:
            written: Weights, state tensors, settings.
            versions: The version counters of the settings before the step.

        Raises:
            NotTraceable, CreatesState, CountsInPython: As for `trace`.
        """
        for name, value in self._before_self.items():
            if not same(vars(self.optimizer)[name], value):
                kind = "number" if type(value) in NUMBERS else type(value).__name__
                raise NotTraceable(self._changes(f"its attribute {name}", kind))
        replaced: dict[int, Tensor] = {}
        counts: list[Place] = []
        pairs = [
            (self._before_groups, self.groups, True),
            (self._before_states, self.states, False),
        ]
        for befores, afters, of_group in pairs:
            for i, (before, now) in enumerate(zip(befores, afters, strict=True)):
                for key in dict.fromkeys([*before, *now]):
                    if key == "params":
                        continue
                    old, new = before.get(key), dict.get(now, key)
                    if same(old, new):
                        continue
                    place = Place(i, key, of_group)
                    self._compare(place, old, new, replaced, counts)
        if counts:
            raise CountsInPython(counts)
        n = len(written) - len(self._settings)
        touched = [t._version for t in written[n:]]
        each = zip(written[n:], touched, versions, strict=True)
        untouched = {id(t) for t, now, before in each if now == before}
        return iter([replaced.get(id(t), None if id(t) in untouched else t) for t in written])

    def _compare(
        self,
        place: Place,
        old: Any,
        new: Any,
        replaced: dict[int, Tensor],
        counts: list[Place],
    ) -> None:
        where = "setting" if place.of_group else "state"
        name = f"{type(self.optimizer).__name__}.step"
        if isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape:
            replaced[id(old)] = new
        elif type(old) in NUMBERS and isinstance(new, (*NUMBERS, Tensor)):
            if isinstance(new, Tensor) or new != old:
                counts.append(place)
        elif old is None:
            raise CreatesState(f"{name} creates the {where} {place.key!r}")
        elif type(old) is type(new) and (is_container(old) or is_object(old)):
            raise NotTraceable(self._changes(f"the {where} {place.key!r}", type(old).__name__))
        elif isinstance(old, Tensor) or isinstance(new, Tensor) or old != new:
            raise NotTraceable(
                f"{name} replaces the {where} {place.key!r} with a {type(new).__name__}"
            )

    def _changes(self, what: str, kind: str) -> str:
        return (
            f"{type(self.optimizer).__name__}.step changes {what}, a Python {kind}, which would "
            "change even if the device skipped the step"
        )


def _own(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a param group, with the same parameters."""
    return copied({k: v for k, v in dict(group).items() if k != "params"})


class _ReadRecorder(dict):
    """The settings of a param group; records which of them are read."""

    def __init__(self, settings: Mapping[str, Any], read: set[str]) -> None:
        super().__init__(settings)
        self._read = read

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self._read.update(self)
        return super().items()


def _implementation(optimizer: Optimizer, on_gpu: bool) -> list[tuple[str, bool]]:
    """Returns the settings that select a compilable implementation of the step.

    `capturable` keeps step counters on the device. On a CPU it is not needed, and optimizers of
    other libraries may refuse it. `foreach` reduces the number of kernel launches with inductor.
    """
    capturable = on_gpu or steps_as_torch(optimizer)
    return [("capturable", capturable), ("fused", False), ("foreach", on_gpu)]


def _with_tensors(
    group: Mapping[str, Any], number: int, settings: Mapping[Place, Tensor]
) -> dict[str, Any]:
    own = dict(group)
    for place, t in settings.items():
        if place.owner != number:
            continue
        if place.item is None:
            own[place.key] = t
        else:
            items = list(own[place.key])
            items[place.item] = t
            own[place.key] = tuple(items)
    return own


def _untraceable_line(optimizer: Optimizer, error: Exception) -> str:
    """Returns a message that names the line of the optimizer at which tracing failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = inspect.getsourcefile(inspect.unwrap(type(optimizer).step))
    folder = os.path.dirname(own or "") + os.sep
    here = os.path.dirname(os.path.dirname(__file__)) + os.sep
    candidates = [f for f in frames if f.filename == own] or [
        f for f in frames if f.filename.startswith(folder) and not f.filename.startswith(here)
    ]
    if "DataDependent" in type(error).__name__:
        first = "the step reads a value from the device in Python"
    elif isinstance(error, WritesRealTensor) or "convert all Tensors to Fake" in str(error):
        first = "the step uses a tensor that is not a direct entry of `state` or `param_groups`"
    else:
        reason = str(error).strip().splitlines()
        first = f"{type(error).__name__}: {reason[0][:200]}" if reason else type(error).__name__
    if not candidates:
        return first
    frame = candidates[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line} ({first})"
