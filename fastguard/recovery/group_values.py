"""The param groups as `GuardedLR` sees them: identity, scheduled values and actual values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguard.errors.checked_numbers import TEXT, number_of
from fastguard.errors.plain_text import shown

Group = dict[str, Any]


class Setting(NamedTuple):
    """How to read and write a hyper-parameter of a param group.

    Attributes:
        read: Returns the value in a group, given with its index, as a number; None if the group has
            no such hyper-parameter.
        write: Sets the value, and returns the value as stored, which may be rounded.
    """

    read: Callable[[Group, int], float | None]
    write: Callable[[Group, float], float]


class KnownGroups:
    """The param groups that have been registered, each with its first parameter."""

    def __init__(self) -> None:
        self._known: list[tuple[Group, Any]] = []

    def join(self, groups: Sequence[Group], before: int) -> None:
        """Adds the groups from index `before` on. Calling it again has no effect."""
        self._known[before:] = [(group, _first_parameter(group)) for group in groups[before:]]

    def check_same(self, groups: Sequence[Group]) -> None:
        """Raises a ValueError if a group was removed.

        A group counts as the same if it is the same dict, even with other parameters, or another
        dict with the same first parameter, as after `load_state_dict`.
        """
        if len(groups) < len(self._known):
            raise ValueError(
                f"the optimizer has {len(groups)} param groups, but GuardedLR has "
                f"{len(self._known)}; after removing a param group, create a new GuardedLR"
            )
        for i, (group, (known, parameter)) in enumerate(zip(groups, self._known, strict=False)):
            first = _first_parameter(group)
            if group is not known and first is not parameter:
                raise ValueError(
                    f"param group {i} of the optimizer is not the same as before; after removing a "
                    "param group, create a new GuardedLR"
                )
            self._known[i] = group, first


class GroupValues:
    """The values of one hyper-parameter in all param groups.

    Args:
        setting: The hyper-parameter.

    Attributes:
        scheduled: The value of each group according to the schedule; None if the group has no such
            hyper-parameter. The groups themselves may hold other values, set by `write`.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.scheduled: list[Any] = []
        self._written: list[float | None] = []
        self._to_write: list[float | None] = []  # differs from `_written` only after an interrupt

    def join(self, groups: Sequence[Group]) -> None:
        """Adds new groups; their current values become the scheduled values.

        After an interrupt, the next call starts from the beginning.
        """
        before = len(self.scheduled)
        joining = [self._setting.read(groups[i], i) for i in range(before, len(groups))]
        self._written[before:] = joining
        self._to_write[before:] = joining
        self.scheduled += joining

    def write(self, groups: Sequence[Group], values: Sequence[float | None]) -> None:
        """Writes values to the groups; None leaves a group unchanged."""
        for i, value in enumerate(values):
            if value is not None:
                self._to_write[i] = value
                self._written[i] = self._setting.write(groups[i], value)

    def restore(self, groups: Sequence[Group]) -> None:
        """Restores the scheduled values in the groups."""
        self.write(groups, self.scheduled)

    def adopt(self, groups: Sequence[Group]) -> None:
        """Makes the current values of the groups the scheduled values."""
        self.scheduled = [self._setting.read(group, i) for i, group in enumerate(groups)]
        self._written, self._to_write = list(self.scheduled), list(self.scheduled)

    def adopt_changed(self, groups: Sequence[Group]) -> None:
        """Makes values that other code has changed the scheduled values.

        Waits for a GPU if the values are tensors on the GPU.
        """
        for i, group in enumerate(groups):
            now = self._setting.read(group, i)
            if now not in (self._written[i], self._to_write[i]):
                self.scheduled[i] = self._written[i] = now

    def rescale_changed(
        self, groups: Sequence[Group], floors: Sequence[float], *, wait: bool = False
    ) -> None:
        """Changes the scheduled values by the ratio by which other code has changed the groups'.

        So a second scheduler, such as `ReduceLROnPlateau`, acts on the schedule although it has
        read values with warm-up and back-off. A ratio above 1 raises no scheduled value above the
        value written, since that may be meant as it is.

        Args:
            groups: The param groups.
            floors: The lower bound of each group; a value clamped to it has no meaningful ratio.
            wait: Whether to read tensors on a GPU too, which waits for it. Default: False.
        """
        for i, group in enumerate(groups):
            if not wait and isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
                continue
            now, written = self._setting.read(group, i), self._written[i]
            if now in (written, self._to_write[i]):
                continue
            before = self.scheduled[i]
            scheduled = now
            if written is not None and now is not None and written > floors[i]:
                scheduled = min(before * (now / written), max(before, now))
            self.scheduled[i], self._written[i] = scheduled, now


def are_captured(groups: Sequence[Group]) -> bool:
    """Whether a CUDA graph captures the learning rates; every replay would write the same value."""
    on_gpu = any(isinstance(group["lr"], Tensor) and group["lr"].is_cuda for group in groups)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _first_parameter(group: Group) -> Any:
    return next(iter(group["params"]), None)


def _read_lr(group: Group, index: int) -> float:
    if "lr" not in group:
        raise ValueError(
            f"GuardedLR needs an optimizer with a learning rate, but param group {index} has none"
        )
    remedy = f"GuardedLR needs a number as lr of param group {index}"
    return number_of("lr", group["lr"], remedy)  # synchronizes if `lr` is a tensor on a GPU


def _write_lr(group: Group, value: float) -> float:
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        group["lr"] = value
        return value
    lr.fill_(value)
    # The value is rounded on the CPU, because reading the tensor itself could sync with a device.
    return torch.tensor(value, dtype=lr.dtype, device="cpu").item()


def _read_momentum(group: Group, index: int) -> float | None:
    del index  # a group without a momentum is not an error
    value = group["betas"][0] if _has_betas(group) else group.get("momentum")
    try:
        return number_of("momentum", value)
    except TypeError:  # the setting is None, or a setting of another kind with this name
        return None


def _write_momentum(group: Group, value: float) -> float:
    if _has_betas(group):
        group["betas"] = (value, *group["betas"][1:])
    else:
        group["momentum"] = value
    return value


def _has_betas(group: Group) -> bool:
    return isinstance(betas := group.get("betas"), tuple | list) and len(betas) > 0


LR = Setting(_read_lr, _write_lr)
MOMENTUM = Setting(_read_momentum, _write_momentum)
"""The momentum of SGD, or beta1 of the Adam family."""


def one_each(name: str, value: float | Sequence[float], before: int, n: int) -> list[float]:
    """Returns the values of an argument for the groups from index `before` to `n - 1`.

    The argument is one number for all groups, or a sequence with one per group. Groups added later
    use the last entry.

    Raises:
        TypeError: An entry is not a number.
        ValueError: The number of entries differs from the number of groups.
    """
    entries = list(value) if isinstance(value, Sequence) else [value]
    if isinstance(value, TEXT):
        raise TypeError(
            f"{name}={shown(value)} must be a number >= 0, or a sequence with one number per "
            "param group"
        )
    numbers = [number_of(name, v, "use a number >= 0, one for each param group") for v in entries]
    if isinstance(value, Sequence) and ((before == 0 and len(entries) != n) or not entries):
        raise ValueError(
            f"{name}={shown(value)} has {len(entries)} entries for {n} param groups; give one "
            "entry per group (groups that are added later use the last entry), or one number for "
            "all groups"
        )
    return [numbers[min(i, len(numbers) - 1)] for i in range(before, n)]
