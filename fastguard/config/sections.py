"""`GuardConfig`: all settings of a guarded run, typed, from a dict, a TOML or a YAML file.

    [guard]               max_norm, norm_type, clip_scope, nonfinite, max_consecutive_skips, ...
    [guard.max_norm]      rule = "ZClip", "AutoClip", "AdaGC" or "AGC", and its settings
    [spike.grad_norm]     window, sigma, warmup, action; or max, action
    [groups."latents.*"]  max_norm, clip_value of the parameters whose names match
    [schedule]  [schedule.warmup]  [rollback]  [checkpoints]  [activations]  [batch]  [records]

An unknown key or a value of the wrong type raises an error that names the key and the most similar
valid one.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastguard.checkpoints import CheckpointStore
from fastguard.config.strict import build, parse, read_text, refuse_empty_sections
from fastguard.diagnosis.activations import ActivationGuard
from fastguard.diagnosis.batch_check import BatchCheck, check_batch, check_order, checked_limits
from fastguard.errors import nearest
from fastguard.errors.plain_text import shown
from fastguard.functional.arguments import limit_of
from fastguard.guard.arguments import check_budget
from fastguard.guard.clip_scope import check_units, checked_limit
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.watch.watch import checked_interval, checked_names
from fastguard.records.json_lines_sink import JsonLinesSink
from fastguard.records.loggers import TensorBoardSink
from fastguard.recovery.guarded_lr import GuardedLR
from fastguard.recovery.rollback import Rollback
from fastguard.recovery.warmup import Warmup
from fastguard.stages.agc import AGC
from fastguard.stages.auto_clip import AutoClip
from fastguard.stages.limit_rules import AdaGC, ZClip
from fastguard.stages.measure import norm_type_of
from fastguard.stages.spike_rules import Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fastguard.ranks.groups import Group


@dataclass(frozen=True, slots=True)
class GuardSection:
    """The arguments of `GuardedOptimizer`."""

    max_norm: float | ZClip | AutoClip | AdaGC | AGC | None = None
    norm_type: float = 2.0
    clip_scope: Literal["global", "group", "tensor", "unit"] = "global"
    nonfinite: Literal["skip", "zero", "raise", "propagate"] = "skip"
    max_consecutive_skips: int | None = None
    flat_buckets: Literal[False, True, "trusted"] = False
    flat_parameters: Literal[False, True, "trusted"] = False
    compile_step: bool = False
    watch: tuple[str, ...] = ()
    watch_every: int | None = None

    def __post_init__(self) -> None:
        checked_limit(self.max_norm)
        check_units(self.clip_scope, self.max_norm)
        norm_type_of(self.norm_type)
        check_budget(self.max_consecutive_skips)
        checked_names(self.watch)
        checked_interval(self.watch_every)


@dataclass(frozen=True, slots=True)
class GroupSection:
    """Separate limits for parameters whose names match a pattern."""

    max_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_norm", "clip_value"):
            if getattr(self, name) is not None:
                limit_of(name, getattr(self, name), quiet=True)


@dataclass(frozen=True, slots=True)
class WarmupSection:
    """The arguments of `Warmup`."""

    steps: int
    lr: float | list[float] = 0.0
    momentum: float | list[float] | None = None


@dataclass(frozen=True, slots=True)
class ScheduleSection:
    """The arguments of `GuardedLR`."""

    floor: float | list[float] = 0.0
    backoff: float = 1.0
    recovery: int | None = None
    warmup: WarmupSection | None = None


@dataclass(frozen=True, slots=True)
class RollbackSection:
    """The arguments of `Rollback`."""

    every: int = 100
    keep: int = 2
    after_skips: int | None = 5
    after_spikes: int | None = None
    lr_factor: float = 0.5
    max_attempts: int = 3


@dataclass(frozen=True, slots=True)
class CheckpointSection:
    """The arguments of `CheckpointStore`; `directory` is relative to the working folder."""

    directory: str
    keep: int = 3
    keep_clean: int = 1
    mode: Literal["min", "max"] | None = None
    on_error: Literal["log", "raise"] = "log"
    ignore: list[str] | None = None


@dataclass(frozen=True, slots=True)
class BatchSection:
    """The arguments of `check_batch`."""

    low: float | dict[str, float] | None = None
    high: float | dict[str, float] | None = None
    names: list[str] = field(default_factory=lambda: ["inputs", "targets"])

    def __post_init__(self) -> None:
        check_order(checked_limits("low", self.low), checked_limits("high", self.high))


@dataclass(frozen=True, slots=True)
class ActivationSection:
    """The arguments of `ActivationGuard`."""

    mode: Literal["count", "clean"] = "count"
    limit: float | None = None
    modules: str | list[str] = "*"


@dataclass(frozen=True, slots=True)
class RecordSection:
    """Destinations of records; relative paths are relative to the working folder."""

    jsonl: str | None = None
    max_bytes: int = 1 << 30
    keep: int | None = None
    name: str | None = None
    host: bool = True
    tensorboard: str | None = None


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """The settings of a guarded run.

    Attributes:
        guard: Arguments of `GuardedOptimizer`.
        spike: Rules by signal: `"grad_norm"` or the name of a loss.
        groups: Separate limits by pattern of parameter names (as in `fnmatch`); the first matching
            pattern applies. `max_norm` in a group needs `clip_scope = "group"`.
        schedule: Arguments of `GuardedLR`.
        rollback: Arguments of `Rollback`; None: no rollback.
        checkpoints: Arguments of `CheckpointStore`; None: no store.
        batch: Arguments of `check_batch`; None: batches are not checked.
        activations: Arguments of `ActivationGuard`; None: activations are not guarded.
        records: Destinations of records.

    Example:
        >>> import torch
        >>> settings = {"guard": {"max_norm": 1.0}, "spike": {"loss": {"max": 9}}}
        >>> config = GuardConfig.from_dict(settings)
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = config.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> opt.max_norm, opt.rules
        (1.0, {'loss': Threshold(max=9.0, action='skip')})
    """

    guard: GuardSection = field(default_factory=GuardSection)
    spike: dict[str, Rule] = field(default_factory=dict)
    groups: dict[str, GroupSection] = field(default_factory=dict)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    rollback: RollbackSection | None = None
    checkpoints: CheckpointSection | None = None
    batch: BatchSection | None = None
    activations: ActivationSection | None = None
    records: RecordSection = field(default_factory=RecordSection)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> GuardConfig:
        """Builds a configuration from nested dicts.

        Args:
            settings: The settings by section.

        Raises:
            ValueError: A key is unknown, or a value is out of range.
            TypeError: A value has the wrong type.
        """
        return build(cls, settings, "")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> GuardConfig:
        """Builds a configuration from a `.toml`, `.yaml` or `.yml` file.

        Args:
            path: The file.

        Raises:
            FileNotFoundError, IsADirectoryError: The path does not exist, or is a folder.
            TypeError, ValueError: The file has another suffix, is larger than 128 KiB, cannot be
                parsed, or has an invalid setting.
            OSError: The file cannot be read, or is a pipe or a device.
            ImportError: YAML support is not installed.
        """
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(
                f"{str(path)!r} is a folder; name the file in it, such as guard.toml"
            )
        text = read_text(path)
        try:
            settings = parse(text, path.suffix)
            refuse_empty_sections(cls, settings)
            return cls.from_dict(settings)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    def wrap(
        self, model: torch.nn.Module, optimizer: Optimizer, *, group: Group = None
    ) -> GuardedOptimizer:
        """Wraps an optimizer in a guard, and opens the destinations of its records.

        A param group is split if a pattern in `groups` matches only some of its parameters, so
        create schedulers afterward, for the returned optimizer. If this method raises an error, the
        optimizer is unchanged.

        Args:
            model: The model, which provides the names of the parameters.
            optimizer: The optimizer to wrap.
            group: The ranks that decide together, as in `GuardedOptimizer`. Default: None.

        Returns:
            The guarded optimizer.

        Raises:
            TypeError, ValueError: A pattern matches no parameter of the optimizer, or a setting
                does not fit the optimizer.
            ImportError, OSError: A destination of records cannot be opened.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}, not a torch.nn.Module; pass "
                "config.wrap(model, optimizer)"
            )
        names = {id(p): name for name, p in model.named_parameters()}
        before = optimizer.param_groups
        groups = self._with_own_limits(before, names)
        with ExitStack() as undo:
            # opened first, so that a failure to open changes nothing
            sinks = self._open_sinks(undo)
            undo.callback(setattr, optimizer, "param_groups", before)
            optimizer.param_groups = groups
            guarded = GuardedOptimizer(
                optimizer,
                spike=self.spike,
                named_parameters=model.named_parameters(),
                group=group,
                **{f.name: getattr(self.guard, f.name) for f in dataclasses.fields(self.guard)},
            )
            undo.pop_all()
        for sink in sinks:
            guarded.add_sink(sink)
        return guarded

    def lr(self, optimizer: GuardedOptimizer, schedule: LRScheduler | None = None) -> GuardedLR:
        """Returns a `GuardedLR` as configured; without a `schedule`, its rate is constant."""
        warmup = self.schedule.warmup
        return GuardedLR(
            optimizer if schedule is None else schedule,
            optimizer=optimizer,
            floor=self.schedule.floor,
            backoff=self.schedule.backoff,
            recovery=self.schedule.recovery,
            warmup=None if warmup is None else Warmup(warmup.steps, warmup.lr, warmup.momentum),
        )

    def rollback_for(
        self,
        optimizer: GuardedOptimizer,
        objects: Mapping[str, Any],
        lr: GuardedLR | None = None,
        store: CheckpointStore | None = None,
    ) -> Rollback | None:
        """Returns a `Rollback` as configured; None if there is no section `rollback`."""
        if self.rollback is None:
            return None
        settings = dataclasses.asdict(self.rollback)
        return Rollback(optimizer, objects, lr=lr, store=store, **settings)

    def open_store(self, *, group: ProcessGroup | None = None) -> CheckpointStore | None:
        """Opens a `CheckpointStore` as configured; None if there is no section `checkpoints`."""
        if self.checkpoints is None:
            return None
        return CheckpointStore(**dataclasses.asdict(self.checkpoints), group=group)

    def check(self, batch: Any) -> BatchCheck | None:
        """Runs `check_batch` as configured; None if there is no section `batch`."""
        if self.batch is None:
            return None
        return check_batch(batch, **dataclasses.asdict(self.batch))

    def guard_activations(self, model: torch.nn.Module) -> ActivationGuard | None:
        """Attaches an `ActivationGuard` as configured; None without a section `activations`."""
        if self.activations is None:
            return None
        return ActivationGuard(model, **dataclasses.asdict(self.activations))

    def _open_sinks(self, undo: ExitStack) -> list[JsonLinesSink | TensorBoardSink]:
        """Opens the destinations of records; `undo` closes them again."""
        sinks: list[JsonLinesSink | TensorBoardSink] = []
        if self.records.jsonl is not None:
            names = ("max_bytes", "keep", "name", "host")
            settings = {name: getattr(self.records, name) for name in names}
            sinks.append(JsonLinesSink(self.records.jsonl, **settings))
            undo.callback(sinks[-1].close)
        if self.records.tensorboard is not None:
            sinks.append(TensorBoardSink(self.records.tensorboard))
            undo.callback(sinks[-1].close)
        return sinks

    def _with_own_limits(
        self, groups: list[dict[str, Any]], names: Mapping[int, str]
    ) -> list[dict[str, Any]]:
        """Returns new param groups, split where a pattern matches only some parameters."""
        if not self.groups:
            return groups
        split: list[dict[str, Any]] = []
        used: set[str] = set()
        for group in groups:
            parts: dict[str | None, list[Any]] = {}
            for p in group["params"]:
                name = names.get(id(p), "")
                pattern = next((g for g in self.groups if fnmatch.fnmatchcase(name, g)), None)
                parts.setdefault(pattern, []).append(p)
            for pattern, params in parts.items():
                own = {} if pattern is None else dataclasses.asdict(self.groups[pattern])
                own = {key: value for key, value in own.items() if value is not None}
                split.append({**group, "params": params, **own})
                used |= {pattern} - {None}  # type: ignore[arg-type]
        for pattern in self.groups:
            if pattern not in used:
                near = nearest(pattern, names.values())
                name = shown(pattern, 200, str)
                raise ValueError(f"groups.{name} matches no parameter of the optimizer{near}")
        return split
