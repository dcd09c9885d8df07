"""`CheckpointStore`: checkpoints of which one is always known to be good."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from fastguard.checkpoints import archive, manifest, rotation, state
from fastguard.checkpoints.arguments import check_choice, counted, integer, joined
from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.folder import Folder, file_name
from fastguard.checkpoints.manifest import Entry
from fastguard.checkpoints.signals import SignalFlag
from fastguard.checkpoints.view import StoreView, Which
from fastguard.errors import describe_culprits
from fastguard.optimizer import GuardedOptimizer
from fastguard.records import StepRecord

log = logging.getLogger("fastguard")


class CheckpointStore(StoreView):
    """A directory of checkpoints with a manifest: which are finite, whole, the best, the last.

    Each checkpoint is written to a temporary file, flushed, read back (every checksum, every tensor
    for NaN and Inf), and only then given its name. `kill -9` at any moment leaves a store that
    opens and whose last clean checkpoint loads. The random state of Python, numpy and torch is
    saved too, so that a resumed run equals an uninterrupted one.

    Args:
        directory: Where they live; created if need be.
        keep: How many of the newest stay, >= 1.
        keep_clean: How many of the newest clean ones stay, >= 1, whatever their age. Save one
            before the first step, and there is always one to go back to.
        mode: Whether the best metric is the smallest (`"min"`) or the largest (`"max"`). The best
            clean checkpoint stays as well. None: as the manifest says, at first `"min"`.
        on_error: What a full or broken disk does: `"log"` an error, so that training goes on and
            `save` returns None, or `"raise"`. Wrong use always raises.
        ignore: Patterns of tensors that are non-finite by design (`"model.*.attn_mask"`); kept in
            the manifest, and None means those kept there.
        read_only: Look, but change nothing; works beside a process that writes.

    Raises:
        StoreLocked: Another process writes to the directory.
        CheckpointError: The directory cannot be used, or a newer release wrote it.

    Example:
        >>> import tempfile, torch, fastguard
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fastguard.GuardedOptimizer(torch.optim.AdamW(model.parameters()))
        >>> store = fastguard.CheckpointStore(tempfile.mkdtemp(), keep=2)
        >>> entry = store.save(model=model, optimizer=opt, step=0)
        >>> entry.clean, entry.n_tensors > 2
        (True, True)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(float("nan"))
        >>> store.save(model=model, optimizer=opt, step=1, epoch=0).bad
        (('model.weight', 2, 0, 0),)
        >>> store.load("last-clean", model=model, optimizer=opt).step
        0
        >>> bool(model.weight.isfinite().all())
        True
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        keep: int = 3,
        keep_clean: int = 1,
        mode: Literal["min", "max"] | None = None,
        on_error: Literal["log", "raise"] = "log",
        ignore: Sequence[str] | None = None,
        read_only: bool = False,
    ) -> None:
        check_choice("mode", mode, ("min", "max", None))
        check_choice("on_error", on_error, ("log", "raise"))
        self.keep = integer("keep", keep, 1)
        self.keep_clean = integer("keep_clean", keep_clean, 1)
        self.on_error = on_error
        self.directory = Path(directory)
        self._flags: list[tuple[SignalFlag, bool]] = []
        self._folder = Folder(self.directory, read_only=read_only, mode=mode, ignore=ignore)

    # Saving.

    def save(
        self,
        objects: Mapping[str, Any] | None = None,
        /,
        *,
        step: int,
        epoch: int | None = None,
        metric: float | None = None,
        tag: Any = None,
        incidents: int | Iterable[StepRecord | str] | None = None,
        **named: Any,
    ) -> Entry | None:
        """Saves a checkpoint. Waits for the device and for the disk.

        Args:
            objects: What to save by name, for names that are no Python words.
            step: Optimizer steps taken so far, >= 0.
            epoch: Epochs finished so far, or whatever the run counts.
            metric: What `best` compares; NaN is never the best.
            tag: Anything JSON can hold.
            incidents: What went wrong since the last save: a number, or the records themselves.
                None: the skipped steps of the `GuardedOptimizer` among the objects, if any.
            **named: What to save: anything with `state_dict()` (model, optimizer, scheduler,
                GradScaler, EMA, data loader), a `torch.Generator`, or plain data such as the
                position in the data set.

        Returns:
            The manifest's entry: `entry.clean` says whether every tensor is finite. None if the
            disk failed and `on_error="log"`.

        Raises:
            TypeError, ValueError: An argument, or something in a state, cannot be saved.
            OSError, DamagedFile: The disk failed, and `on_error="raise"`.
        """
        everything = joined(objects, named)
        step = integer("step", step, 0)
        epoch = None if epoch is None else integer("epoch", epoch, 0)
        manifest.check_tag(tag)
        states, data = state.gather(everything)

        known = self._folder.manifest
        guards = [value for value in everything.values() if isinstance(value, GuardedOptimizer)]
        skipped = sum(guard.skipped_steps for guard in guards) if guards else None
        count, notes = counted(self.last(), incidents, skipped)
        serial = known.next_serial
        entry = Entry(
            serial=serial,
            file=file_name(step, serial, archive.suffix_of({**states, **data})),
            step=step,
            epoch=epoch,
            metric=None if metric is None else float(metric),
            tag=tag,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            incidents=count,
            notes=notes,
            skipped_steps=skipped,
        )
        payload = {
            archive.HEADER: {"version": manifest.VERSION, **entry.header},
            "objects": states,
            "data": data,
            "rng": state.random_state(),
        }
        try:
            entry = self._folder.add(entry, payload, self._staying)
        except (OSError, DamagedFile) as error:
            if self.on_error == "raise":
                raise
            log.error(
                "step %d was NOT saved: %s; training goes on, the last clean checkpoint is %s",
                step,
                error,
                self.last_clean(),
            )
            return None
        if not entry.finite:
            culprits = describe_culprits(entry.bad)
            log.warning("the checkpoint of step %d is not finite: %s", step, culprits)
        return entry

    def maybe_save(
        self,
        objects: Mapping[str, Any] | None = None,
        /,
        *,
        step: int,
        every: int | None = None,
        **rest: Any,
    ) -> Entry | None:
        """Saves if it is time: each `every` steps, and when a signal has asked the run to end.

        The place for it is the end of the training loop's body, where model, optimizer, scheduler
        and data position belong to the same step. It costs a comparison when there is nothing to
        do.

        Args:
            objects, step, **rest: As in `save`.
            every: Steps between two checkpoints; None: only when a signal came.

        Raises:
            SystemExit: A signal came (status 128 + its number), after the checkpoint was saved and
                verified, the previous handlers were restored and the store was closed.
        """
        pending = [(flag, leave) for flag, leave in self._flags if flag.received is not None]
        due = every is not None and step > 0 and step % every == 0
        if not pending and not due:
            return None
        entry = self.save(objects, step=step, **rest)
        for flag, leave in pending:
            number = flag.received or 0
            flag.restore()
            self._flags.remove((flag, leave))
            log.warning(
                "signal %d: the run ends at step %d; saved %s", number, step, entry or "nothing"
            )
            if leave:
                self.close()
                raise SystemExit(128 + number)
        return entry

    def save_on_signal(self, *signals: int, exit: bool = True) -> SignalFlag:
        """From now on a signal ends the run with a verified checkpoint, at the next `maybe_save`.

        The handler only sets a flag: it may run in the middle of a step. Call this in the main
        thread.

        Args:
            *signals: Which ones; SIGTERM if none is given.
            exit: Whether `maybe_save` raises SystemExit after saving. If not, look at
                `store.stop_requested` before it.

        Returns:
            A context manager; leaving it, or its `restore()`, puts the previous handlers back.
        """
        flag = SignalFlag(signals or (signal.SIGTERM,))
        self._flags.append((flag, exit))
        return flag

    @property
    def stop_requested(self) -> bool:
        """Whether a signal of `save_on_signal` came that `maybe_save` has not yet obeyed."""
        return any(flag.received is not None for flag, _ in self._flags)

    # Going back.

    def rollback(self, to: Which = "last-clean") -> Entry:
        """Makes an earlier checkpoint the last one again, atomically, keeping what it replaces.

        What was saved after it leaves the list: it stays on disk with `.replaced` behind its name
        until the next rollback. The steps to come continue from `entry.step`.

        Args:
            to: As in `load`. The target is read from the disk first.

        Raises:
            CheckpointError: There is no such checkpoint, or it is not clean.
        """
        self._folder.check_open()
        target = self._find(to)
        while True:
            target, problem = self._folder.verify(target)
            if target.clean:
                break
            if to != "last-clean":
                raise CheckpointError(
                    f"{target} cannot be rolled back to{f': {problem}' if problem else ''}; "
                    'use "last-clean"'
                )
            log.error("passing over %s: %s", target, problem)
            target = self._find(to)
        aside = self._folder.roll_back(target)
        names = ", ".join(entry.file for entry in aside) or "nothing"
        log.warning("rolled back to %s; put aside: %s", target, names)
        return target

    def close(self) -> None:
        """Restores signal handlers and lets the next writer in."""
        for flag, _ in self._flags:
            flag.restore()
        self._flags = []
        self._folder.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _staying(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return rotation.kept(entries, self.keep, self.keep_clean, self._folder.manifest.mode)
