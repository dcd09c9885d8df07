"""`Watch`: the quantities that a guarded optimizer watches, and the steps in which it reads them.

A watched step measures as every step does, then reads the quantities, then decides, so watching
does not change training by a single bit. In other steps nothing is read, allocated or exchanged.
The values reach the host together with the record of the step: on a GPU through pinned memory,
synchronized by the same event.

All ranks must watch the same steps, or the vectors that they exchange would differ in length. So
watched steps are counted from the first step of the process, which all ranks take together, and not
by the step number, which a rank may have loaded from another checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastguard.errors import nearest
from fastguard.errors.checked_numbers import count_of
from fastguard.errors.plain_text import shown
from fastguard.gradients.tensor_kinds import PLAIN, has_numbers
from fastguard.gradients.transfer import numbers_on
from fastguard.guard.flat_step import FlatStep
from fastguard.guard.watch.noise_scale import NoiseScale
from fastguard.guard.watch.quantity import Quantity, Reading, WatchedGradients
from fastguard.guard.watch.replica_drift import ReplicaDrift
from fastguard.guard.watch.tensor_norms import TensorNorms
from fastguard.guard.watch.underflow import Underflow
from fastguard.guard.watch.update_ratio import UpdateRatio
from fastguard.optim.optimizer import FusedOptimizer
from fastguard.ranks.team import Team
from fastguard.stages.contract import Known, Signals
from fastguard.stages.grad_stats import GradStats

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

    from fastguard.gradients.buckets import GradBuckets
    from fastguard.guard.guarded import GuardedOptimizer

WatchName = Literal["tensor_norms", "update_ratio", "noise_scale", "replica_drift", "underflow"]

QUANTITIES: dict[str, type[Quantity]] = {
    "tensor_norms": TensorNorms,
    "update_ratio": UpdateRatio,
    "noise_scale": NoiseScale,
    "replica_drift": ReplicaDrift,
    "underflow": Underflow,
}

EVERY = 100
"""Default interval between steps in which a quantity is read."""

IN_EVERY_STEP = ("replica_drift",)
"""Quantities that are read in every step by default: an incident must not wait for 100 steps."""


class Watch:
    """The watched quantities, and how often they are read.

    Args:
        names: Names of the quantities, each once, in the order of `QUANTITIES`.
        every: Interval between the steps in which they are read; None: 1 for quantities in
            `IN_EVERY_STEP`, `EVERY` for all others.
    """

    def __init__(self, names: tuple[str, ...], every: int | None) -> None:
        self.names: tuple[str, ...] = names
        self.every: int | None = every
        self._quantities = {name: QUANTITIES[name]() for name in names}
        self._intervals = {name: every or (1 if name in IN_EVERY_STEP else EVERY) for name in names}
        noise = self._quantities.get("noise_scale")
        self._noise = noise if isinstance(noise, NoiseScale) else None
        self._steps = 0

    @property
    def has_state(self) -> bool:
        """Whether a quantity depends on earlier steps."""
        return self._noise is not None

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """Returns what a state dict keeps: the averages of the noise scale, float64 `(2,)`.

        All records so far must have been made.
        """
        if self._noise is None:
            return {}
        return {"noise_scale": numbers_on(self._noise.averages, device)}

    def state_in(self, saved: Mapping[str, Any] | None) -> tuple[float, float]:
        """Returns the averages in a saved state; zeros if it has none.

        Raises:
            ValueError: The averages are damaged.
        """
        given = None if saved is None or self._noise is None else saved.get("noise_scale")
        if given is None:
            return (0.0, 0.0)
        if not isinstance(given, Tensor) or given.shape != (2,) or given.dtype != torch.float64:
            raise ValueError(
                f"state_dict['fastguard'] has noise_scale={shown(given)}, expected a float64 "
                "tensor of shape (2,); delete the entry to start with a new guard"
            )
        if not has_numbers(given):
            return (0.0, 0.0)
        signal, noise = given.tolist()
        if not (math.isfinite(signal) and math.isfinite(noise)):
            raise ValueError(
                f"state_dict['fastguard'] has noise_scale={[signal, noise]}, so it is damaged; "
                "delete the entry to start with a new guard"
            )
        return signal, noise

    def go_on_from(self, state: tuple[float, float]) -> None:
        """Continues from the result of `state_in`."""
        if self._noise is not None:
            self._noise.averages = state

    def read(self, step: WatchedGradients) -> WatchedStep | None:
        """Counts a step, and reads the quantities that are due. Never waits.

        Returns:
            The values; None if no quantity is due.

        Raises:
            ValueError: An input that a quantity needs is missing.
        """
        due = [name for name in self.names if self._steps % self._intervals[name] == 0]
        self._steps += 1
        if not due or _is_capturing(step.device):
            return None
        step.due = frozenset(due)
        return WatchedStep([self._quantities[name].read(step) for name in due])


class WatchedStep:
    """The values read in one step, until they are part of its record."""

    def __init__(self, readings: list[Reading]) -> None:
        self._readings = readings

    def with_values(self, signals: Signals) -> Signals:
        """Returns the signals with the values that are summed over the ranks."""
        summed = [r.values for r in self._readings if r.sums_over_ranks]
        return replace(signals, watched=torch.cat(summed)) if summed else signals

    def take_sums(self, signals: Signals) -> None:
        """Replaces values with their sums over the ranks."""
        if signals.watched is None:
            return
        shared = [r for r in self._readings if r.sums_over_ranks]
        sums = signals.watched.split([len(r.values) for r in shared])
        for reading, total in zip(shared, sums, strict=True):
            reading.values = total

    @contextmanager
    def during_update(self) -> Iterator[None]:
        """Context in which the optimizer steps."""
        with ExitStack() as stack:
            for reading in self._readings:
                if reading.during_update is not None:
                    stack.enter_context(reading.during_update)
            yield

    def after_update(self) -> None:
        """Updates the values after the optimizer has stepped, or was skipped."""
        for reading in self._readings:
            if reading.after_update is not None:
                reading.values = reading.after_update()
                reading.after_update = None  # releases the copies

    def values(self) -> Tensor:
        """Returns all values, float64 `(n,)`."""
        return torch.cat([reading.values for reading in self._readings])

    def results(self, numbers: list[float], known: Known) -> dict[str, Any]:
        """Returns `StepRecord.watch` for this step.

        Args:
            numbers: The result of `values()` as floats.
            known: The decision.
        """
        told: dict[str, Any] = {}
        at = 0
        for reading in self._readings:
            n = len(reading.values)
            told |= reading.results(numbers[at : at + n], known)
            at += n
        return told


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured. The replays of a graph have no records."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def read_step(
    watch: Watch,
    run: GuardedOptimizer,
    buckets: GradBuckets,
    stats: GradStats,
    signals: Signals,
    scaler: GradScaler | None,
) -> tuple[WatchedStep | None, Signals]:
    """Reads the watched quantities, if this is a watched step.

    Args:
        watch: The watched quantities.
        run: The guarded optimizer.
        buckets, signals: The inputs of the step.
        stats: The result of the measure stage.
        scaler: The loss scaler; None: there is none, or it is unknown.

    Returns:
        The values or None, and the signals with the values that are summed over the ranks.
    """
    if buckets.kind is not PLAIN:
        return None, signals
    scale = None if scaler is None else scaler._scale
    if scale is None and signals.inv_scale is not None:
        scale = signals.inv_scale.reciprocal()
    step = WatchedGradients(
        run._gradients.layout,
        buckets,
        stats,
        run._device,
        signals.inv_scale,
        scale,
        None if run.rank_watch is None else run.rank_watch.take_squared_norm,
        run.optimizer if isinstance(run.optimizer, FusedOptimizer) else None,
        run._stepper.weights if isinstance(run._stepper, FlatStep) else None,
    )
    watched = watch.read(step)
    return (None, signals) if watched is None else (watched, watched.with_values(signals))


def watch_of(names: object, every: object, team: Team | None, norm_type: float) -> Watch | None:
    """Returns the watch for the arguments of `GuardedOptimizer`; None: nothing is watched.

    Raises:
        TypeError: `names` is not a collection of names.
        ValueError: A name is unknown or repeated, `every` is not a number of steps, or the settings
            do not support a quantity.
    """
    interval = checked_interval(every)
    chosen = checked_names(names)
    if "noise_scale" in chosen or "replica_drift" in chosen:
        name = "replica_drift" if "replica_drift" in chosen else "noise_scale"
        if team is None:
            raise ValueError(
                f"watch holds {name!r}, which compares ranks, but there is no group; pass "
                "group=fastguard.Replicated(process_group)"
            )
        if team.distinct:
            raise ValueError(
                f"watch holds {name!r}, which compares replicas, but the ranks of group= hold "
                "different tensors; pass group=fastguard.Replicated(process_group)"
            )
    if "replica_drift" in chosen and team is not None and team.has_dtensors:
        raise ValueError(
            "watch holds 'replica_drift', which compares plain tensors, but some parameters are "
            "DTensors; remove 'replica_drift' from watch"
        )
    if "noise_scale" in chosen and norm_type != 2.0:
        raise ValueError(
            f"watch holds 'noise_scale', which needs L2 norms, but norm_type={norm_type:g}; use "
            "norm_type=2.0, or remove 'noise_scale' from watch"
        )
    return Watch(chosen, interval) if chosen else None


def checked_interval(every: object) -> int | None:
    """Returns `watch_every`.

    Raises:
        ValueError: The argument is neither None nor a number of steps.
    """
    return None if every is None else count_of("watch_every", every, 1, optional=True)


def checked_names(names: object) -> tuple[str, ...]:
    """Returns the names of quantities in the order of `QUANTITIES`.

    Raises:
        TypeError: The argument is not a collection of names.
        ValueError: A name is unknown or repeated.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(
            f"watch={shown(names)} must be a tuple of names, such as watch=('tensor_norms',)"
        )
    given = list(names)
    for name in given:
        if not isinstance(name, str):
            raise TypeError(
                f"watch holds {shown(name)}; expected the name of a quantity; {_REMEDY}"
            )
        if name not in QUANTITIES:
            raise ValueError(
                f"watch holds {shown(name)}, which is unknown{nearest(name, QUANTITIES)}"
            )
        if given.count(name) > 1:
            raise ValueError(f"watch holds {name!r} {given.count(name)} times; pass it once")
    return tuple(name for name in QUANTITIES if name in given)


_REMEDY = f"use names from {', '.join(QUANTITIES)}"


def check_watchable(names: tuple[str, ...], steps_first: bool, optimizer: object) -> None:
    """Raises a ValueError for a quantity that cannot be watched with an optimizer.

    Args:
        names: Names of the watched quantities.
        steps_first: Whether the optimizer steps before the decision, see `WholeStep`.
        optimizer: The optimizer.
    """
    if steps_first and "update_ratio" in names:
        raise ValueError(
            "watch holds 'update_ratio', which needs the weights before the update, but "
            f"{type(optimizer).__name__} evaluates a closure in the middle of its step "
            "and changes the weights before the guard reads the gradients; remove 'update_ratio' "
            "from watch"
        )
