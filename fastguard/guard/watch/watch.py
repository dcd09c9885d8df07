"""`Watch`: the quantities that a guarded optimizer watches, and when it reads them.

A watched step reads, then measures and decides as every other step does: to watch changes no bit of
what is trained. Between watched steps nothing is read, allocated or exchanged. What was read
travels with the step's record: on a GPU in pinned memory, behind the event that the record waits
for anyway.

Ranks must watch the same steps, or their vectors would differ in length. So watched steps are
counted from the first step of the process, which every rank takes together, and not by a step
number, which a rank may have loaded from another checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastguard.errors import nearest
from fastguard.errors.checked_numbers import count_of
from fastguard.errors.plain_text import shown
from fastguard.gradients.tensor_kinds import PLAIN
from fastguard.guard.watch.noise_scale import NoiseScale
from fastguard.guard.watch.quantity import Quantity, Reading, WatchedGradients
from fastguard.guard.watch.replica_drift import ReplicaDrift
from fastguard.guard.watch.tensor_norms import TensorNorms
from fastguard.guard.watch.underflow import Underflow
from fastguard.guard.watch.update_ratio import UpdateRatio
from fastguard.ranks.team import Team
from fastguard.stages.contract import Known, Signals

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

WATCH_EVERY = 100
"""Steps from one watched step to the next, by default."""


class Watch:
    """What is watched, and how often.

    Args:
        names: Of the quantities, each once, in the order of `QUANTITIES`.
        every: Steps from one watched step to the next.
    """

    def __init__(self, names: tuple[str, ...], every: int) -> None:
        self.names: tuple[str, ...] = names
        self.every: int = every
        self._quantities = [QUANTITIES[name]() for name in names]
        self._steps = 0

    def read(self, step: WatchedGradients) -> WatchedStep | None:
        """Counts a step, and reads it if it is a watched one. Waits for nothing.

        Raises:
            ValueError: The step lacks what a quantity needs.
        """
        due = self._steps % self.every == 0
        self._steps += 1
        if not due or _is_capturing(step.device):
            return None
        return WatchedStep([quantity.read(step) for quantity in self._quantities])


class WatchedStep:
    """What was read of one step, on its way through the decision to the record."""

    def __init__(self, readings: list[Reading]) -> None:
        self._readings = readings

    def told(self, signals: Signals) -> Signals:
        """The signals with what the ranks add up."""
        summed = [r.values for r in self._readings if r.sums_over_ranks]
        return replace(signals, watched=torch.cat(summed)) if summed else signals

    def take_sums(self, signals: Signals) -> None:
        """Takes what the ranks added up."""
        if signals.watched is None:
            return
        shared = [r for r in self._readings if r.sums_over_ranks]
        sums = signals.watched.split([len(r.values) for r in shared])
        for reading, total in zip(shared, sums, strict=True):
            reading.values = total

    def after_update(self) -> None:
        """The optimizer has stepped, or was told not to."""
        for reading in self._readings:
            if reading.after_update is not None:
                reading.values = reading.after_update()
                reading.after_update = None  # releases the copies

    def values(self) -> Tensor:
        """float64 `(n,)`: everything that the host is to know."""
        return torch.cat([reading.values for reading in self._readings])

    def tell(self, numbers: list[float], known: Known) -> dict[str, Any]:
        """`StepRecord.watch` of this step.

        Args:
            numbers: `values()`, on the host.
            known: What was decided.
        """
        told: dict[str, Any] = {}
        at = 0
        for reading in self._readings:
            n = len(reading.values)
            told |= reading.tell(numbers[at : at + n], known)
            at += n
        return told


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured: its replays leave no records."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def read_step(
    watch: Watch | None,
    run: GuardedOptimizer,
    buckets: GradBuckets,
    signals: Signals,
    scaler: GradScaler | None,
) -> tuple[WatchedStep | None, Signals]:
    """Reads a step that is to be watched: what was read, and the signals with what ranks add up.

    Args:
        watch: What is watched; None: nothing.
        run: The guarded optimizer.
        buckets, signals: Of this step.
        scaler: The loss scaler that takes it; None: there is none, or it is unknown.
    """
    if watch is None or buckets.kind is not PLAIN:
        return None, signals
    scale = None if scaler is None else scaler._scale
    if scale is None and signals.inv_scale is not None:
        scale = signals.inv_scale.reciprocal()
    step = WatchedGradients(
        run._gradients.layout,
        run._device,
        buckets.sharing,
        signals.inv_scale,
        scale,
        None if run.rank_watch is None else run.rank_watch.take_squared_norm,
    )
    watched = watch.read(step)
    return (None, signals) if watched is None else (watched, watched.told(signals))


def watch_of(names: object, every: object, team: Team | None, norm_type: float) -> Watch | None:
    """The watch that `GuardedOptimizer` was asked for; None: it watches nothing.

    Raises:
        TypeError: `names` is no collection of names.
        ValueError: A name is unknown or comes twice, `every` is no number of steps, or the guard
            lacks what a quantity needs.
    """
    steps = count_of("watch_every", every, 1)
    chosen = checked_names(names)
    if "noise_scale" in chosen or "replica_drift" in chosen:
        name = "replica_drift" if "replica_drift" in chosen else "noise_scale"
        if team is None:
            raise ValueError(
                f"watch holds {name!r}, which compares ranks, and this process decides alone; pass "
                "group=fastguard.Replicated(process_group)"
            )
        if team.distinct:
            raise ValueError(
                f"watch holds {name!r}, which compares replicas, but the ranks of group= hold "
                "different tensors; pass group=fastguard.Replicated(process_group)"
            )
    if "replica_drift" in chosen and team is not None and team.has_dtensors:
        raise ValueError(
            "watch holds 'replica_drift', which compares plain tensors that every rank holds whole,"
            " but some parameters are DTensors; leave it out"
        )
    if "noise_scale" in chosen and norm_type != 2.0:
        raise ValueError(
            f"watch holds 'noise_scale', which is made of L2 norms, but norm_type={norm_type:g}; "
            "use norm_type=2.0, or leave it out"
        )
    return Watch(chosen, steps) if chosen else None


def checked_names(names: object) -> tuple[str, ...]:
    """The names of quantities, in the order of `QUANTITIES`.

    Raises:
        TypeError: It is no collection of names.
        ValueError: One is unknown, or comes twice.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(
            f"watch={shown(names)} must be a tuple of names, such as watch=('tensor_norms',)"
        )
    given = list(names)
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"watch holds {shown(name)}, which is no name; {_KNOWN}")
        if name not in QUANTITIES:
            raise ValueError(
                f"watch holds {shown(name)}, which is unknown{nearest(name, QUANTITIES)}"
            )
        if given.count(name) > 1:
            raise ValueError(f"watch holds {name!r} {given.count(name)} times; name it once")
    return tuple(name for name in QUANTITIES if name in given)


_KNOWN = f"use names among {', '.join(QUANTITIES)}"


def check_road(names: tuple[str, ...], steps_first: bool, optimizer: object) -> None:
    """Raises a ValueError for a quantity that the road of an optimizer has no place for.

    Args:
        names: What is watched.
        steps_first: Whether the optimizer steps before anything is decided.
        optimizer: It.
    """
    if steps_first and "update_ratio" in names:
        raise ValueError(
            "watch holds 'update_ratio', which compares the weights before and after the update, "
            f"but {type(optimizer).__name__} evaluates its closure itself and has moved them when "
            "the guard sees the gradients; leave it out"
        )
