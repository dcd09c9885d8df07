"""Code shared by all integrations: guarding, assigning losses and batches, writing records."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.reporting import ReportingOptimizer
from fastguard.ranks.groups import Replicated
from fastguard.records.json_lines_sink import JsonLinesSink, check_file, check_sink, tell_guard
from fastguard.records.recorder import Recorder
from fastguard.records.step_record import StepRecord

Sink = Callable[[StepRecord], object]


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Wraps imports of a framework; if it is missing, the error names the extra to install.

    Args:
        extra: Name of the extra in pyproject.toml.

    Raises:
        ModuleNotFoundError: The framework is missing; the message contains the install command.

    Example:
        >>> with needs("lightning"):
        ...     import no_such_framework
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: no_such_framework is not installed; run: pip install
        'torch-fastguard[lightning]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed; run: pip install 'torch-fastguard[{extra}]'",
            name=error.name,
        ) from error


def guarded(
    optimizer: Optimizer,
    model: nn.Module | None,
    options: Mapping[str, Any],
    *,
    world_size: int,
    replicated: bool,
    max_norm: float | None = None,
) -> GuardedOptimizer:
    """Guards a trainer's optimizer with suitable defaults, which the user's options override.

    Args:
        optimizer: The optimizer; a `GuardedOptimizer` is returned unchanged.
        model: The model whose parameters records name, if known.
        options: The user's arguments of `GuardedOptimizer`, which take precedence.
        world_size: Number of training processes.
        replicated: Whether each holds a replica of the model with the same gradients (DDP).
        max_norm: The trainer's own limit. Default: None.

    Raises:
        ValueError: There are several processes without replicas, and `options` has no `group`.
    """
    if isinstance(optimizer, GuardedOptimizer):
        return optimizer
    defaults = {
        "max_norm": max_norm,
        "named_parameters": None if model is None else model.named_parameters(),
        **default_group(options, world_size, replicated=replicated),
    }
    return GuardedOptimizer(optimizer, **{**defaults, **options})


def default_group(
    options: Mapping[str, Any], world_size: int, *, replicated: bool
) -> dict[str, Replicated]:
    """Returns the `group` argument of `GuardedOptimizer` for the way a model is distributed.

    Args:
        options: The user's options; a `group` there is kept.
        world_size: Number of training processes.
        replicated: Whether each holds a replica of the model with the same gradients (DDP).

    Returns:
        `{"group": ...}`, or an empty dict if no argument is needed.

    Raises:
        ValueError: There are several processes without replicas, so each process would decide by
            itself.

    Example:
        >>> default_group({}, 1, replicated=False)
        {}
    """
    if world_size == 1 or "group" in options:
        return {}
    world = dist.group.WORLD
    if not replicated or world is None:
        raise ValueError(
            f"the {world_size} processes do not hold replicas of the model, so pass group= to the "
            "guard: None if parameters are DTensors (FSDP2, tensor parallelism), the process "
            "group if each rank holds different plain tensors (FSDP1)"
        )
    return {"group": Replicated(world)}


def engine_error(engine: str) -> ValueError:
    """Returns the error for a trainer whose steps are taken by an engine such as DeepSpeed.

    DeepSpeed and Megatron keep copies of the gradients and clip them by their own settings. A guard
    around the inner optimizer of such an engine would clip a second time, or never be called.

    Args:
        engine: The name of the engine.
    """
    return ValueError(
        f"{engine} takes the steps and clips by its own settings, so nothing can be guarded here; "
        "train with DDP or FSDP2, or use the engine without the trainer and guard the optimizer "
        "that you pass to it, as docs/recipes.md does with DeepSpeed and Megatron-Core"
    )


def refuse_deepspeed(strategy: object) -> None:
    """Raises a ValueError for a strategy that trains through DeepSpeed.

    The strategy is recognized by its class name, because different packages define different
    classes.

    Example:
        >>> refuse_deepspeed(object())
    """
    if any("DeepSpeed" in kind.__name__ for kind in type(strategy).__mro__):
        raise engine_error(type(strategy).__name__)


def optimizer_of_loss(
    optimizers: Sequence[GuardedOptimizer], loss: Tensor, world_size: int
) -> GuardedOptimizer | None:
    """Returns the optimizer that a loss belongs to; None if it is unknown.

    The optimizer is known if there is only one and the loss is a scalar. On several ranks, losses
    are combined over a group, so an optimizer without a group gets no loss.
    """
    if len(optimizers) != 1 or loss.numel() != 1:
        return None
    (optimizer,) = optimizers
    return optimizer if world_size == 1 or optimizer.group is not None else None


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether any parameter has a gradient; with flat buckets, every parameter has one."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


class BatchSpan:
    """The batches that contribute gradients to the next step of an optimizer.

    Example:
        >>> span = BatchSpan()
        >>> for batch in (6, 7):
        ...     span.begin(2, batch)
        ...     span.add()
        >>> span.tag(4)
        {'epoch': 2, 'batch': '6-7', 'global_step': 4}
    """

    def __init__(self) -> None:
        self._now: tuple[int | None, int] | None = None  # epoch and batch
        # the first and the last batch of the next step
        self._added: list[tuple[int | None, int]] = []
        self._stepped: tuple[int | None, int] | None = None  # current batch at the last step
        self._tag: dict[str, Any] = {}  # tag of the step in progress

    @property
    def has_stepped(self) -> bool:
        """Whether a step has been taken on the current batch."""
        return self._now is not None and self._now == self._stepped

    def begin(self, epoch: int | None, batch: int) -> None:
        """Sets the current batch.

        Args:
            epoch: The epoch; None if not counted.
            batch: Number of the batch within the epoch.
        """
        self._now = epoch, batch

    def add(self, *, to: Optimizer | None = None) -> None:
        """Adds the current batch to the next step, before the backward pass of the batch.

        Args:
            to: The optimizer of the step. If its parameters have no gradients, earlier batches do
                not count: they did not contribute, or their gradients were cleared. Default:
                None: earlier batches count.
        """
        if to is not None and not has_gradients(to):
            self._added.clear()
        if self._now is not None:
            self._added[1:] = [self._now]
            if self._tag:  # in this case, the backward pass is part of the closure of a step
                self._tag.update(self._position())

    def tag(self, global_step: int) -> dict[str, Any]:
        """Returns a tag that identifies these batches; `add` updates it until `clear`.

        Args:
            global_step: The number of the step, from 1.
        """
        self._tag = {**self._position(), "global_step": global_step}
        return self._tag

    def clear(self) -> None:
        """Starts a new span after a step."""
        self._added.clear()
        self._stepped, self._tag = self._now, {}

    def _position(self) -> dict[str, Any]:
        if self._now is None:
            return {}
        added = self._added or [self._now]
        (_, first), (epoch, last) = added[0], added[-1]
        batch = last if added[0] == added[-1] else f"{first}-{last}"
        return {"batch": batch} if epoch is None else {"epoch": epoch, "batch": batch}


class StepTags:
    """Tags the steps of a trainer, unless the caller of `step` passes a tag.

    Args:
        optimizer: The optimizer; its `step` is called without arguments, or with a closure.
        tag: Returns the tag of the next step. Called before a closure is evaluated.
        clear: Called after each step.
        defaults: Further arguments of `step`, unless the caller passes them.
    """

    def __init__(
        self,
        optimizer: GuardedOptimizer,
        tag: Callable[[], dict[str, Any]],
        clear: Callable[[], object],
        **defaults: Any,
    ) -> None:
        self._tag, self._clear, self._defaults = tag, clear, defaults
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def remove(self) -> None:
        """Stops tagging."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, _: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {"tag": self._tag(), **self._defaults, **kwargs}

    def _after_step(self, *_: Any) -> None:
        self._clear()


class RunRecords:
    """Writes a run's records to one file and to sinks, in one process per run.

    The file is opened when training starts. Records are appended, so a resumed run continues it.

    Args:
        records: The JSON lines file; its folder is created. None: no file.
        sinks: Called with each record.

    Raises:
        TypeError: `records` is not a path, or a sink is not callable.
        OSError: `records` is a folder.

    Example:
        >>> RunRecords(None, print)
        Traceback (most recent call last):
        ...
        TypeError: sinks=<built-in function print> must be a list of sinks, such as [print]
    """

    def __init__(
        self, records: str | os.PathLike[str] | None = None, sinks: Sequence[Sink] = ()
    ) -> None:
        if not isinstance(sinks, list | tuple):
            name = getattr(sinks, "__name__", "sink")
            raise TypeError(f"sinks={sinks!r} must be a list of sinks, such as [{name}]")
        for sink in sinks:
            check_sink(sink)
        # The file is opened later, when the working directory may have changed.
        self.records: Path | None = None if records is None else check_file(records).absolute()
        self.sinks: tuple[Sink, ...] = tuple(sinks)
        self._files: weakref.WeakKeyDictionary[ReportingOptimizer, _File] = (
            weakref.WeakKeyDictionary()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"records": self.records, "sinks": self.sinks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def begin(
        self,
        optimizers: Sequence[ReportingOptimizer],
        *,
        writes: bool,
        completed: Callable[[StepRecord], StepRecord] | None = None,
    ) -> None:
        """Opens the files when training starts or continues.

        Args:
            optimizers: All optimizers of the run, in a fixed order. Each counts its own steps, so
                the records of the second one go to `records-1.jsonl`.
            writes: Whether this process writes.
            completed: Returns a record with data added that only the trainer knows. Default: None.

        Raises:
            OSError: A file cannot be opened.
        """
        if not writes:
            return
        for i, optimizer in enumerate(optimizers):
            if optimizer not in self._files:
                self._files[optimizer] = file = _File(self.records, i, optimizer)
                for sink in (file, *self.sinks):
                    if completed is None:
                        optimizer.add_sink(sink)
                    else:
                        tell_guard(sink, optimizer.describe(), optimizer._device)
                        optimizer.add_sink(_Completed(sink, completed))
                # On a GPU, the record of the last step may still be in transfer.
                recorder = weakref.ref(optimizer._recorder)
                weakref.finalize(optimizer, _wait_for_records, recorder)
            self._files[optimizer].open()

    def end(self) -> None:
        """Waits for the last records and closes the files when training ends."""
        for optimizer, file in self._files.items():
            optimizer._recorder.wait()
            file.close()


class _File:
    """The file for one optimizer's records, if any."""

    def __init__(self, records: Path | None, number: int, optimizer: ReportingOptimizer) -> None:
        if records is not None and number:
            records = records.with_name(f"{records.stem}-{number}{records.suffix}")
        self.path = records
        self._sink: JsonLinesSink | None = None
        # does not refer to the optimizer itself, whose sinks refer to this object
        self._guard = optimizer.describe(), optimizer._device

    def open(self) -> None:
        if self._sink is None and self.path is not None:
            self._sink = JsonLinesSink(self.path)
            self._sink.add_guard(*self._guard)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def __call__(self, record: StepRecord) -> None:
        self.open()  # reopens the file if training continues after its end
        if self._sink is not None:
            self._sink(record)


class _Completed:
    """A sink that receives completed records."""

    def __init__(self, sink: Sink, completed: Callable[[StepRecord], StepRecord]) -> None:
        self.sink, self.completed = sink, completed

    def __call__(self, record: StepRecord) -> None:
        self.sink(self.completed(record))

    def __repr__(self) -> str:
        return repr(self.sink)


def _wait_for_records(reference: weakref.ref[Recorder]) -> None:
    recorder = reference()
    if recorder is not None:
        recorder.wait()
