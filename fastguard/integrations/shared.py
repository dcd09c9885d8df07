"""What the guards of all trainers share: what is guarded, whose loss it is, which batch, where the
records go."""

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
from fastguard.guard.reporting import KnownRun
from fastguard.ranks.groups import Replicated
from fastguard.records.json_lines_sink import JsonLinesSink, check_file, check_sink
from fastguard.records.recorder import Recorder
from fastguard.records.step_record import StepRecord

Sink = Callable[[StepRecord], object]


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of a framework: a missing one names the extra that brings it.

    Args:
        extra: Name of the extra in pyproject.toml.

    Raises:
        ModuleNotFoundError: With the command that installs the extra.

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
    """The optimizer of a trainer, guarded as usual there unless the user says otherwise.

    Args:
        optimizer: A `GuardedOptimizer` is returned as it is.
        model: Whose parameters records name, if it is known.
        options: The user's arguments of `GuardedOptimizer`, which go before all others.
        world_size: How many processes train.
        replicated: Each holds one replica of the model, with the same gradients (DDP).
        max_norm: The trainer's own limit.

    Raises:
        ValueError: Several processes hold no replicas, and `options` do not say what they hold.
    """
    if isinstance(optimizer, GuardedOptimizer):
        return optimizer
    usual = {
        "max_norm": max_norm,
        "named_parameters": None if model is None else model.named_parameters(),
        **usual_group(options, world_size, replicated=replicated),
    }
    return GuardedOptimizer(optimizer, **{**usual, **options})


def usual_group(
    options: Mapping[str, Any], world_size: int, *, replicated: bool
) -> dict[str, Replicated]:
    """The `group` of `GuardedOptimizer` that goes with how a framework spreads a model.

    Args:
        options: What the user gave; a `group` there is left alone.
        world_size: How many processes train.
        replicated: Each holds one replica of the model, with the same gradients (DDP).

    Returns:
        The argument by name, or nothing.

    Raises:
        ValueError: Only the user can know what the ranks hold: each would decide for itself.

    Example:
        >>> usual_group({}, 1, replicated=False)
        {}
    """
    if world_size == 1 or "group" in options:
        return {}
    world = dist.group.WORLD
    if not replicated or world is None:
        raise ValueError(
            f"the {world_size} processes do not hold replicas of the model, so give the guard a "
            "group=: None where parameters are DTensors (FSDP2, tensor parallelism), the process "
            "group where each rank holds other plain tensors (FSDP1)"
        )
    return {"group": Replicated(world)}


def engine_error(engine: str) -> ValueError:
    """What to raise where a trainer steps through an engine: there is no step left to guard.

    DeepSpeed and Megatron keep copies of the gradients and clip them by their own settings; a guard
    around the optimizer that they were given would clip a second time, or never be called at all.

    Args:
        engine: What the trainer calls it.
    """
    return ValueError(
        f"under {engine} an engine steps by itself and clips by settings of its own, so nothing "
        "can be guarded here; train with DDP or FSDP2, or use the engine without the trainer and "
        "guard what it is given, as docs/recipes.md does with DeepSpeed and Megatron-Core"
    )


def refuse_deepspeed(strategy: object) -> None:
    """Raises a ValueError for a strategy that trains through DeepSpeed.

    Known by the names of its classes: each edition of Lightning has its own, also outside Lightning
    (Habana's), and they are kinds of DDPStrategy to some and not to others.

    Example:
        >>> refuse_deepspeed(object())
    """
    if any("DeepSpeed" in kind.__name__ for kind in type(strategy).__mro__):
        raise engine_error(type(strategy).__name__)


def alone_in_training(
    optimizers: Sequence[GuardedOptimizer], loss: Tensor, world_size: int
) -> GuardedOptimizer | None:
    """The optimizer that a loss belongs to; None if that is not clear.

    It is clear where one optimizer trains on one number. Losses of several ranks are joined over a
    group, so without one they stay unseen.
    """
    if len(optimizers) != 1 or loss.numel() != 1:
        return None
    (optimizer,) = optimizers
    return optimizer if world_size == 1 or optimizer.group is not None else None


class BatchSpan:
    """The batches whose gradients the coming step is taken with.

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
        self._added: list[tuple[int | None, int]] = []  # the first and the last one

    def begin(self, epoch: int | None, batch: int) -> None:
        """This batch is the current one.

        Args:
            epoch: None where nobody counts them.
            batch: Its number within the epoch.
        """
        self._now = epoch, batch

    def add(self) -> None:
        """The gradients of the current batch are added to those that wait for the step."""
        if self._now is not None:
            self._added[1:] = [self._now]

    def tag(self, global_step: int) -> dict[str, Any]:
        """Where to find these batches again.

        Args:
            global_step: The number of the step, from 1.
        """
        tag: dict[str, Any] = {"global_step": global_step}
        if self._now is None:
            return tag
        added = self._added or [self._now]
        (_, first), (epoch, last) = added[0], added[-1]
        batch = last if added[0] == added[-1] else f"{first}-{last}"
        return {"batch": batch, **tag} if epoch is None else {"epoch": epoch, "batch": batch, **tag}

    def clear(self) -> None:
        """The step has been taken: the next batch is the first of the next span."""
        self._added.clear()


class StepTags:
    """Gives the steps of a trainer a tag, unless the caller of `step` has given one.

    Args:
        optimizer: Its `step` is called without arguments, or with a closure.
        tag: Returns the tag of the coming step. Called before a closure is evaluated.
        clear: Called when the step has been taken.
        usual: Further arguments of `step`, unless the caller gives them.
    """

    def __init__(
        self,
        optimizer: GuardedOptimizer,
        tag: Callable[[], dict[str, Any]],
        clear: Callable[[], object],
        **usual: Any,
    ) -> None:
        self._tag, self._clear, self._usual = tag, clear, usual
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def remove(self) -> None:
        """Steps have no tags any more."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, _: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {"tag": self._tag(), **self._usual, **kwargs}

    def _after_step(self, *_: Any) -> None:
        self._clear()


class RunRecords:
    """Where the records of a run go: one file, and sinks. One process of a run writes.

    The file is opened when training begins and appended to, so a resumed run goes on in it.

    Args:
        records: The file of JSON lines; its folder is created. None: no file.
        sinks: Called with each record.

    Raises:
        TypeError: `records` is no path, or a sink cannot be called.
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
        # Absolute: the file is opened later, and programs change the working directory.
        self.records = None if records is None else check_file(records).absolute()
        self.sinks = tuple(sinks)
        self._files: weakref.WeakKeyDictionary[KnownRun, _File] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"records": self.records, "sinks": self.sinks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def begin(
        self,
        optimizers: Sequence[KnownRun],
        *,
        writes: bool,
        completed: Callable[[StepRecord], StepRecord] | None = None,
    ) -> None:
        """Training begins, or goes on: opens the files.

        Args:
            optimizers: All of this run, in an order that does not change. The records of the second
                one go to `records-1.jsonl`: each counts steps of its own.
            writes: Whether this process is the one that writes.
            completed: Adds to a record what only the trainer knows.

        Raises:
            OSError: A file cannot be opened.
        """
        if not writes:
            return
        for i, optimizer in enumerate(optimizers):
            if optimizer not in self._files:
                self._files[optimizer] = file = _File(self.records, i)
                for sink in (file, *self.sinks):
                    optimizer.add_sink(sink if completed is None else _Completed(sink, completed))
                # On a GPU the record of the last step is on its way until something asks for it.
                recorder = weakref.ref(optimizer._recorder)
                weakref.finalize(optimizer, _wait_for_records, recorder)
            self._files[optimizer].open()

    def end(self) -> None:
        """Training ends: waits for the last records, and closes the files."""
        for optimizer, file in self._files.items():
            optimizer._recorder.wait()
            file.close()


class _File:
    """The file of one optimizer's records, if there is to be one."""

    def __init__(self, records: Path | None, number: int) -> None:
        if records is not None and number:
            records = records.with_name(f"{records.stem}-{number}{records.suffix}")
        self.path = records
        self._sink: JsonLinesSink | None = None

    def open(self) -> None:
        if self._sink is None and self.path is not None:
            self._sink = JsonLinesSink(self.path)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def __call__(self, record: StepRecord) -> None:
        self.open()  # after the end of a training that goes on all the same
        if self._sink is not None:
            self._sink(record)


class _Completed:
    """A sink that gets completed records."""

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
