"""`CheckpointStore`: saves checkpoints and always keeps one that is known to be good."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastguard.checkpoints import archive, manifest, rotation
from fastguard.checkpoints import object_states as state
from fastguard.checkpoints.arguments import check_choice, counted, integer, joined
from fastguard.checkpoints.entry import Entry
from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.folder import Folder
from fastguard.checkpoints.names import MAX_NUMBER, file_name
from fastguard.checkpoints.random_state import random_state
from fastguard.checkpoints.reader import StoreView, Which
from fastguard.checkpoints.reading.file_report import HEADER
from fastguard.checkpoints.stop_signal import SignalFlag
from fastguard.errors import describe_culprits
from fastguard.errors.checked_numbers import number_of
from fastguard.errors.logger import log
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.ranks.lockstep import Peers
from fastguard.records.step_record import StepRecord

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CheckpointStore(StoreView):
    """A directory of checkpoints, with a manifest that says which are finite, intact and best.

    Each checkpoint is written to a temporary file and read back, to compare its checksums and to
    check every tensor for NaN and Inf; only then is it renamed. After `kill -9` at any moment, the
    store can be opened and its last clean checkpoint loaded. The random states of Python, numpy and
    torch are saved too, so that a resumed run equals an uninterrupted one.

    Args:
        directory: The directory; created if it does not exist.
        keep: Number of newest checkpoints to keep, >= 1.
        keep_clean: Number of newest clean checkpoints to keep, >= 1, regardless of age. Save one
            before the first step, so that there is always one to load.
        mode: Whether the best metric is the smallest (`"min"`) or the largest (`"max"`). The best
            clean checkpoint is kept too. None: the mode in the manifest, initially `"min"`.
        on_error: What to do if the disk is full or broken: `"log"` an error and let `save` return
            None, so that training continues, or `"raise"`. Incorrect use always raises.
        ignore: Patterns of tensors that are non-finite by design (`"model.*.attn_mask"`); stored in
            the manifest. None: the stored patterns.
        read_only: Change nothing; works while another process writes.
        group: The ranks that share the store (`torch.distributed.group.WORLD`). All ranks open,
            save, load and roll back together, or fail together; rank 0 writes the manifest. None:
            this process only.

    Raises:
        StoreLocked: Another process writes to the directory.
        CheckpointError: The directory cannot be used, or its `manifest.json` was written by a newer
            release or another tool.

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
        group: ProcessGroup | None = None,
    ) -> None:
        check_choice("mode", mode, ("min", "max", None))
        check_choice("on_error", on_error, ("log", "raise"))
        self.keep: int = integer("keep", keep, 1)
        self.keep_clean: int = integer("keep_clean", keep_clean, 1)
        self.on_error = on_error
        # absolute, since programs change the working directory
        self.directory: Path = Path(directory).absolute()
        self._flags: list[tuple[SignalFlag, bool]] = []
        self._folder = Folder(
            self.directory, read_only=read_only, mode=mode, ignore=ignore, peers=Peers(group)
        )

    # Saves checkpoints.

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
        """Saves a checkpoint; waits for the device and the disk.

        Args:
            objects: Objects to save, for names that are not Python identifiers.
            step: Optimizer steps taken so far, >= 0; equal on all ranks.
            epoch: Epochs completed so far, or any other count.
            metric: The value that `best` compares; NaN is never best. With several ranks, rank 0's
                metric, epoch, tag and incidents are used.
            tag: Any value that JSON can represent.
            incidents: Incidents since the last save: a number, or the records themselves. None: the
                number of steps skipped by a `GuardedOptimizer` among the objects.
            **named: Objects to save: anything with `state_dict()` (model, optimizer, scheduler,
                GradScaler, EMA, data loader), a `torch.Generator`, or plain data such as the
                position in the data set.

        Returns:
            The new entry; `entry.clean` says whether every tensor is finite. None if the disk
            failed and `on_error="log"`.

        Raises:
            TypeError, ValueError: An argument, or a value in a state, cannot be saved.
            OSError, DamagedFile: The disk failed and `on_error="raise"`.
        """
        entry, payload = self._folder.peers.together(
            lambda: self._prepare(joined(objects, named), step, epoch, metric, tag, incidents)
        )
        entry = self._agreed(entry)
        payload[HEADER] = {"version": manifest.VERSION, **entry.header}
        try:
            entry = self._folder.add(entry, payload, self._staying)
        except (OSError, DamagedFile) as error:
            if self.on_error == "raise":
                raise
            unsure = entry.serial in {e.serial for e in self.list()}
            log.error(
                "step %d was %s: %s. Training continues; the last clean checkpoint is %s",
                entry.step,
                "saved, but may be lost in a power failure" if unsure else "NOT saved",
                error,
                self.last_clean(),
            )
            return None
        if not entry.finite:
            culprits = describe_culprits(entry.bad)
            log.warning("the checkpoint at step %d is not finite: %s", entry.step, culprits)
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
        """Saves every `every` steps, and after a signal that ends the run.

        Call this method at the end of the loop body, when model, optimizer, scheduler and data
        position all belong to the same step. If nothing is due, it only makes a comparison.

        Args:
            objects, step, **rest: As in `save`.
            every: Steps between two checkpoints, >= 1; None: save only after a signal.

        Returns:
            The new entry as in `save`; None if nothing was due.

        Raises:
            ValueError: `every` is not an integer >= 1.
            TypeError, ValueError, OSError, DamagedFile: As in `save`.
            SystemExit: A signal was received; the status is 128 plus the signal number. The
                checkpoint has been saved and verified, the previous handlers restored, and the
                store closed.
        """
        if every is not None:
            every = integer("every", every, 1)
        heard = zip(self._flags, self._received_signals(), strict=True)
        pending = [(flag, leave, number) for (flag, leave), number in heard if number is not None]
        due = every is not None and step > 0 and step % every == 0
        if not pending and not due:
            return None
        entry = self.save(objects, step=step, **rest)
        # In reverse order, so that each flag restores the handler that it replaced.
        for flag, leave, number in reversed(pending):
            flag.restore()
            self._flags.remove((flag, leave))
            log.warning(
                "signal %d: stopping at step %d; saved %s", number, step, entry or "nothing"
            )
            if leave:
                self.close()
                raise SystemExit(128 + number)
        return entry

    def save_on_signal(self, *signals: int, exit: bool = True) -> SignalFlag:
        """Makes a signal end the run at the next `maybe_save`, which saves a verified checkpoint.

        The handler only sets a flag, since it may run in the middle of a step. Call this in the
        main thread. Signals may reach the ranks in different steps, so with a `group` every
        `maybe_save` communicates with the other ranks: about 0.1 ms, plus a device sync with NCCL.

        Args:
            *signals: The signals; SIGTERM if none is given.
            exit: Whether `maybe_save` raises SystemExit after saving. If False, check
                `store.stop_requested` before calling `maybe_save`.

        Returns:
            A context manager; leaving it, or calling its `restore()`, reinstalls the previous
            handlers.
        """
        flag = SignalFlag(signals or (signal.SIGTERM,))
        self._flags.append((flag, exit))
        return flag

    def _received_signals(self) -> list[int | None]:
        """Returns the signal of each flag, or None; a signal on one rank counts for all ranks."""
        numbers = [flag.received for flag, _ in self._flags]
        if not numbers or self._folder.peers.size == 1:
            return numbers
        everywhere = zip(*self._folder.peers.gather(numbers), strict=True)
        return [next((n for n in found if n is not None), None) for found in everywhere]

    @property
    def stop_requested(self) -> bool:
        """Whether a signal from `save_on_signal` is pending.

        With several ranks, each rank knows only its own signals until `maybe_save`.
        """
        return any(flag.received is not None for flag, _ in self._flags)

    # Goes back to an earlier checkpoint.

    def rollback(self, to: Which = "last-clean") -> Entry:
        """Atomically makes an earlier checkpoint the last one; later checkpoints are set aside.

        Later checkpoints are removed from the list; their files are kept until the next rollback,
        with `.replaced` appended to their names. Training continues from `entry.step`.

        Args:
            to: A checkpoint as in `load`. It is read from disk first.

        Returns:
            The entry that is now the last one.

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
                    f"cannot roll back to {target}{f': {problem}' if problem else ''}; "
                    'use "last-clean"'
                )
            log.error("skipping %s: %s", target, problem)
            target = self._find(to)
        aside = self._folder.roll_back(target)
        names = ", ".join(entry.file for entry in aside) or "nothing"
        log.warning("rolled back to %s; set aside: %s", target, names)
        return target

    def close(self) -> None:
        """Restores signal handlers and releases the lock so that another process can write."""
        for flag, _ in reversed(self._flags):  # in reverse order, as in `maybe_save`
            flag.restore()
        self._flags = []
        self._folder.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(
        self,
        everything: Mapping[str, Any],
        step: int,
        epoch: int | None,
        metric: float | None,
        tag: Any,
        incidents: int | Iterable[StepRecord | str] | None,
    ) -> tuple[Entry, dict[str, Any]]:
        """Returns the metadata known before writing, as an entry, and the data to write."""
        step = integer("step", step, 0)
        if step > MAX_NUMBER:
            raise ValueError(f"step={step} is too large for the name of a checkpoint")
        epoch = None if epoch is None else integer("epoch", epoch, 0)
        manifest.check_tag(tag)
        states, data = state.gather(everything)
        guards = [value for value in everything.values() if isinstance(value, GuardedOptimizer)]
        counts = [guard.lifetime for guard in guards]  # a rollback does not undo incidents
        skipped = sum(c.skipped - c.loss_scale_skips for c in counts) if guards else None
        count, notes = counted(self.last(), incidents, skipped)
        serial = self._folder.manifest.next_serial
        suffix = archive.suffix_of({**states, **data}, self._folder.peers)
        entry = Entry(
            serial=serial,
            file=file_name(step, serial, suffix),
            step=step,
            epoch=epoch,
            metric=None if metric is None else number_of("metric", metric),
            tag=tag,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            incidents=count,
            notes=notes,
            skipped_steps=skipped,
        )
        return entry, {"objects": states, "data": data, "rng": random_state()}

    def _agreed(self, entry: Entry) -> Entry:
        """Returns rank 0's entry after checking that all ranks are at the same step."""
        entries = self._folder.peers.gather(entry)
        steps = sorted({e.step for e in entries})
        if len(steps) > 1:
            raise CheckpointError(
                f"the ranks save different steps to {self.directory}: "
                f"{', '.join(map(str, steps))}; call save at the same step on all ranks"
            )
        return entries[0]

    def _staying(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return rotation.kept(entries, self.keep, self.keep_clean, self._folder.manifest.mode)
