"""The update of an optimizer as one graph, in which every write is masked by the verdict.

    g <- multiplier * (g if finite else 0 if the verdict cleans)      where the optimizer reads it
    x <- old x if found_inf else what the optimizer makes of x        weights, state and counters

The optimizer's own Python is traced once, with placeholders in place of all tensors, so tracing
changes nothing, and what cannot be traced shows before anything is done. Compiled, each array is
read once and written once, as without the mask: the copies exist in the graph only.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer

from fastguard.guard.inner_step import steps_as_torch
from fastguard.guard.tensor_settings import Branch, TensorSettings, python_of_tensors
from fastguard.stages.formulas import SMALLEST_FACTOR, factor_dtype
from fastguard.versions import as_if_compiling

NUMBERS = (int, float)


class Place(NamedTuple):
    """Where an optimizer keeps a number or a tensor.

    Attributes:
        owner: The number of a param group, or of a parameter among those that are updated.
        key: Its name there.
        of_group: Whether it is a setting of a param group; False: state of a parameter.
        item: The position in a tuple of numbers such as `betas`; None: the value itself is meant.
    """

    owner: int
    key: str
    of_group: bool = True
    item: int | None = None

    def value_in(self, settings: Mapping[str, Any]) -> Any:
        """What is there."""
        value = settings[self.key]
        return value if self.item is None else value[self.item]


class NotTraceable(Exception):
    """The update of an optimizer cannot be compiled. The message says why."""


class CreatesState(Exception):
    """The step would create state, for which there is no value to keep when it is skipped."""


class CountsInPython(Exception):
    """The step changes numbers that it keeps in Python.

    Args:
        places: Where these are.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        super().__init__(places)
        self.places = places


@dataclass(frozen=True, slots=True)
class Members:
    """What an update is about.

    Attributes:
        params: The parameters that have a gradient.
        groups: The number of the param group of each.
        segments: The number of the clip coefficient of each.
        states: The names of the tensors in the state of each.
        has_constants: Whether there is anything else in these states: a graph holds it as it was.
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
        """Reads the state of some parameters."""
        states = [
            tuple(k for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor))
            for p in params
        ]
        kept = [len(optimizer.state.get(p, ())) for p in params]
        return Members(params, groups, segments, states, kept != list(map(len, states)))

    def inputs(self, optimizer: Optimizer) -> list[Tensor]:
        """Parameters, gradients and state tensors, in the order of the graph's inputs.

        Raises:
            KeyError: There is less state than when the graph was made.
        """
        state = optimizer.state
        inputs: list[Any] = [*self.params, *[p.grad for p in self.params]]
        for p, keys in zip(self.params, self.states, strict=True):
            of_p = state[p] if keys else {}
            inputs += [of_p[key] for key in keys]
        return inputs


@dataclass(slots=True)
class Traced:
    """A traced update.

    Attributes:
        graph: Takes `found_inf`, `multiplier`, `clean`, then `Members.inputs`, then the settings.
        read: The names of the settings that the step reads, by param group.
        branches: The comparisons of settings that it depends on.
    """

    graph: GraphModule
    read: list[set[str]]
    branches: list[Branch]


def trace(optimizer: Optimizer, members: Members, settings: Mapping[Place, Tensor]) -> Traced:
    """Traces the update of the parameters in `members`.

    Args:
        optimizer: Nothing of it is changed.
        members: What it is to update.
        settings: The settings that are tensors, or are to be: the tensor for each place.

    Raises:
        NotTraceable: What the step does cannot be compiled.
        CreatesState, CountsInPython: It can, once its state is there, and in tensors.
    """
    notes: dict[str, Any] = {}

    def update(found_inf: Tensor, multiplier: Tensor, clean: Tensor, *rest: Tensor) -> tuple:
        n = len(members.params)
        weights, grads = list(rest[:n]), rest[n : 2 * n]
        others = iter(rest[2 * n :])
        states = [{k: next(others) for k in keys} for keys in members.states]
        tensors = dict(zip(settings, others, strict=True))
        for w, g, segment in zip(weights, grads, members.segments, strict=True):
            w.grad = _as_decided(g, multiplier.select(0, segment), clean)
        double = _Double(optimizer, members, weights, states, tensors)
        written = [*weights, *chain.from_iterable(s.values() for s in states), *tensors.values()]
        before = [t.clone() for t in written]
        versions = [t._version for t in tensors.values()]
        known = [
            (t, place, _number(place.value_in(optimizer.param_groups[place.owner])))
            for place, t in tensors.items()
        ]
        mode = TensorSettings([(t, place, value) for t, place, value in known if value is not None])
        with mode, as_if_compiling(), python_of_tensors(type(optimizer)):
            double.step()
        notes.update(read=double.read, branches=mode.branches)
        after = double.after(written, versions)
        skip = found_inf != 0
        for t, old, new in zip(written, before, after, strict=True):
            if new is not None:
                t.copy_(torch.where(skip, old, new))
        return ()

    device = members.params[0].device
    scalar = torch.zeros((), device=device)
    verdict = scalar, scalar.new_ones(1 + max(members.segments), dtype=torch.float64), scalar
    inputs = [t.detach() for t in (*verdict, *members.inputs(optimizer), *settings.values())]
    return Traced(make_fx(update, tracing_mode="fake")(*inputs), **notes)


class _Double:
    """An optimizer as the given one, of placeholders.

    Args:
        optimizer: The given one.
        members: What is updated.
        weights: What stands for the parameters.
        states: The state tensors of each.
        settings: The settings that are tensors.
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
        self.groups: list[_Noting] = []
        for i, group in enumerate(optimizer.param_groups):
            params = [w for w, g in zip(weights, members.groups, strict=True) if g == i]
            own = {**_with_tensors(group, i, settings), "params": params}
            own.update((k, v) for k, v in _form(optimizer, on_gpu) if k in group)
            self.groups.append(_Noting(own, self.read[i]))
        self.states = [
            {**optimizer.state.get(p, {}), **tensors}
            for p, tensors in zip(members.params, states, strict=True)
        ]
        self._before_groups = [dict.copy(group) for group in self.groups]
        self._before_states = [dict(state) for state in self.states]
        self._settings = settings
        self.optimizer = double = object.__new__(type(optimizer))
        double.__dict__.update(
            (k, v.copy() if isinstance(v, dict | list | set) else v)
            for k, v in vars(optimizer).items()
        )
        double.__dict__.pop("step", None)  # a scheduler's, around that of the given one
        double.param_groups = self.groups  # type: ignore[assignment]
        double.state = defaultdict(dict, zip(weights, self.states, strict=True))  # type: ignore[arg-type]
        self._before_self = {k: v for k, v in vars(double).items() if type(v) in NUMBERS}

    def step(self) -> None:
        """Steps, below torch's wrappers."""
        try:
            inspect.unwrap(type(self.optimizer).step)(self.optimizer)
        except Exception as error:
            raise NotTraceable(_line_that_stopped(self.optimizer, error)) from error

    def after(self, written: Sequence[Tensor], versions: Iterable[int]) -> Iterator[Tensor | None]:
        """What the step has made of each of these tensors; None: it has not touched it.

        Args:
            written: Weights, state tensors, settings.
            versions: Those of the settings before the step.

        Raises:
            NotTraceable, CreatesState, CountsInPython: See there.
        """
        for name, number in self._before_self.items():
            if vars(self.optimizer)[name] != number:
                raise NotTraceable(
                    f"{type(self.optimizer).__name__}.step changes its attribute {name}, a Python "
                    "number, which a skip on the device cannot leave as it was"
                )
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
                    if old is new:
                        continue
                    place = Place(i, key, of_group)
                    self._compare(place, old, new, replaced, counts)
        if counts:
            raise CountsInPython(counts)
        n = len(written) - len(self._settings)
        touched = [t._version for t in written[n:]]
        same = [a == b for a, b in zip(touched, versions, strict=True)]
        untouched = {id(t) for t, s in zip(written[n:], same, strict=True) if s}
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
        elif isinstance(old, Tensor) or isinstance(new, Tensor) or old != new:
            raise NotTraceable(
                f"{name} replaces the {where} {place.key!r} by a {type(new).__name__}"
            )


class _Noting(dict):
    """The settings of a param group, which notes those that are read."""

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


def _form(optimizer: Optimizer, on_gpu: bool) -> list[tuple[str, bool]]:
    """Which implementation: capturable ones count on the device, and inductor makes few launches of
    the foreach ones. Those of other libraries may refuse `capturable` on a CPU, where they can do
    without.
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


def _number(value: Any) -> float | None:
    """A number that a comparison may be decided by; None: it lives on the device."""
    return value if type(value) in NUMBERS else None


def _as_decided(grad: Tensor, multiplier: Tensor, clean: Tensor) -> Tensor:
    """As `fastguard.stages.reference.apply`, out of place."""
    wide = factor_dtype(grad.dtype)
    cleaned = torch.where(grad.isfinite() | (clean == 0), grad, 0.0)
    factor = multiplier.to(wide)
    tiny = factor < SMALLEST_FACTOR  # one multiplication by it would not be exact enough
    first = torch.where(tiny, SMALLEST_FACTOR, 1.0).to(wide)
    factor = torch.where(tiny, (multiplier / SMALLEST_FACTOR).to(wide), factor)
    return (cleaned.to(wide) * first * factor).to(grad.dtype)


def _line_that_stopped(optimizer: Optimizer, error: Exception) -> str:
    """Says which line of the optimizer cannot be traced."""
    frames = traceback.extract_tb(error.__traceback__)
    own = inspect.getsourcefile(inspect.unwrap(type(optimizer).step))
    folder = os.path.dirname(own or "") + os.sep
    here = os.path.dirname(os.path.dirname(__file__)) + os.sep
    candidates = [f for f in frames if f.filename == own] or [
        f for f in frames if f.filename.startswith(folder) and not f.filename.startswith(here)
    ]
    if "DataDependent" in type(error).__name__:
        first = "it needs, in Python, a number that is on the device"
    elif "convert all Tensors to FakeTensors" in str(error):
        first = "it uses a tensor that is no entry of `state` or `param_groups` by itself"
    else:
        reason = str(error).strip().splitlines()
        first = f"{type(error).__name__}: {reason[0][:200]}" if reason else type(error).__name__
    if not candidates:
        return first
    frame = candidates[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line} ({first})"
