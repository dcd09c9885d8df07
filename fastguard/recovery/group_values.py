"""One hyper-parameter of all param groups: what the schedule wants, and what the groups hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguard.errors.checked_numbers import TEXT, number_of

Group = dict[str, Any]


class Setting(NamedTuple):
    """How a hyper-parameter is read from a param group and written into it.

    Attributes:
        read: Its value as a number; None if the group has none.
        write: Puts a value there; returns what the group holds now, which rounding may change.
    """

    read: Callable[[Group], float | None]
    write: Callable[[Group, float], float]


class GroupValues:
    """What the schedule wants for each param group, and what was written there in its place.

    Args:
        setting: Which hyper-parameter.

    Attributes:
        scheduled: By group, what the schedule wants; None where there is no such hyper-parameter.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.scheduled: list[Any] = []
        self._held: list[float | None] = []

    def join(self, groups: Sequence[Group]) -> None:
        """Takes in the groups that were added: what they hold is what the schedule wants."""
        joining = [self._setting.read(group) for group in groups[len(self.scheduled) :]]
        self.scheduled += joining
        self._held += joining

    def write(self, groups: Sequence[Group], values: Sequence[float | None]) -> None:
        """Writes other values than the schedule's into the groups."""
        for i, value in enumerate(values):
            if value is not None:
                self._held[i] = self._setting.write(groups[i], value)

    def put_back(self, groups: Sequence[Group]) -> None:
        """Makes the groups hold what the schedule wants."""
        self.write(groups, self.scheduled)

    def take_over(self, groups: Sequence[Group]) -> None:
        """What the groups hold is what the schedule wants."""
        self.scheduled = [self._setting.read(group) for group in groups]
        self._held = list(self.scheduled)

    def take_over_changed(self, groups: Sequence[Group]) -> None:
        """What others have written since is what the schedule wants. Waits for a GPU's tensors."""
        for i, group in enumerate(groups):
            now = self._setting.read(group)
            if now != self._held[i]:
                self.scheduled[i] = self._held[i] = now

    def leave_changed(self, groups: Sequence[Group], values: list[float | None]) -> None:
        """Takes out of `values`, to be written next, those for groups that others have written to.

        A group with a tensor learning rate is not read, for that would wait for a GPU.
        """
        for i, group in enumerate(groups[: len(values)]):
            if not isinstance(group["lr"], Tensor) and self._setting.read(group) != self._held[i]:
                values[i] = None


def _read_lr(group: Group) -> float:
    if "lr" not in group:
        raise ValueError(
            "GuardedLR needs an optimizer with a learning rate; a param group of this one has none"
        )
    # Waits if the learning rate is a tensor on a GPU.
    return number_of("lr", group["lr"], "GuardedLR needs an optimizer that is given a number")


def _write_lr(group: Group, value: float) -> float:
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        group["lr"] = value
        return value
    lr.fill_(value)
    return torch.tensor(value, dtype=lr.dtype, device="cpu").item()  # the tensor itself may be far


def _read_momentum(group: Group) -> float | None:
    if "betas" in group:
        return float(group["betas"][0])
    return float(group["momentum"]) if "momentum" in group else None


def _write_momentum(group: Group, value: float) -> float:
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    else:
        group["momentum"] = value
    return value


LR = Setting(_read_lr, _write_lr)
MOMENTUM = Setting(_read_momentum, _write_momentum)
"""Momentum of SGD, beta1 of the Adam family."""


def one_each(name: str, value: float | Sequence[float], before: int, n: int) -> list[float]:
    """The values of an argument for groups `before` to `n`, one for all or one for each.

    Groups that join later take the last entry.

    Raises:
        TypeError, ValueError: It is no number, or there is another number of entries than groups.
    """
    entries = list(value) if isinstance(value, Sequence) else [value]
    if isinstance(value, TEXT):
        raise TypeError(f"{name}={value!r} must be a number >= 0, or one for each param group")
    numbers = [number_of(name, v, "use a number >= 0, one for each param group") for v in entries]
    if isinstance(value, Sequence) and ((before == 0 and len(entries) != n) or not entries):
        raise ValueError(
            f"{name}={value!r} has {len(entries)} entries for {n} param groups; give one for each "
            "(groups that are added later take the last one), or one number for all"
        )
    return [numbers[min(i, len(numbers) - 1)] for i in range(before, n)]
