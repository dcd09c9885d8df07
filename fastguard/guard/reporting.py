"""What is known about a guarded run while it runs: records, counters, and who decides how.

Also the end of each step: it is written down, or taken back, and those who act on records are told.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy

from fastguard.errors import NonFiniteGradError
from fastguard.gradients.tensor_parts import copies_for_deepcopy
from fastguard.guard.arguments import raise_if_over_budget
from fastguard.guard.clip_scope import ClipScope, Limit
from fastguard.guard.lifetime import NOTHING, Lifetime
from fastguard.guard.param_gradients import Gradients
from fastguard.guard.state_dict import guard_state
from fastguard.guard.step_in_flight import StepInFlight
from fastguard.guard.stepper import Stepper, stepper_for
from fastguard.guard.watch.watch import WATCH_EVERY, Watch
from fastguard.guard.wrapper import OptimizerAround
from fastguard.ranks.groups import Group
from fastguard.records.json_lines_sink import sink_of
from fastguard.records.losses import ObservedLosses
from fastguard.records.recorder import Recorder
from fastguard.records.step_record import StepRecord
from fastguard.records.subscription import Inbox
from fastguard.stages.backend import backend_of
from fastguard.stages.contract import GuardState, NonFinite, Verdict
from fastguard.stages.spike_rules import Rule

Sink = Callable[[StepRecord], object]


class KnownRun(OptimizerAround):
    """An optimizer that tells what its steps did."""

    group: Group
    max_norm: Limit | None
    norm_type: float
    clip_scope: ClipScope
    nonfinite: NonFinite
    rules: Mapping[str, Rule]
    max_consecutive_skips: int | None
    last: Verdict | None
    _gradients: Gradients
    _watch: Watch | None = None
    _device: torch.device
    _recorder: Recorder
    _state: GuardState
    _steps_taken: int
    _taken_back = NOTHING
    _stepper: Stepper
    _observed: ObservedLosses
    _flight: StepInFlight | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> KnownRun:
        """A copy decides with the same ranks: process groups and stores cannot be copied."""
        parameters = (p for group in self.param_groups for p in group["params"])
        modes = (getattr(p, "fake_mode", None) for p in parameters)
        for shared in (self.group, self._gradients.team, *modes):
            memo[id(shared)] = shared
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        kept = [self.optimizer.state, settings, self._policy, self._state]
        memo.update(copies_for_deepcopy(kept))
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def records(self) -> list[StepRecord]:
        """Takes out the records of finished steps: each is returned once, oldest first.

        A second call returns only what has come since; `history` looks without taking out. Never
        waits.
        """
        return self._recorder.drain()

    @property
    def history(self) -> list[StepRecord]:
        """The last 4096 records of finished steps, oldest first; leaves those of `records()` there.

        Steps that were taken back by a load or a rollback are still in it. Never waits.
        """
        self._recorder.poll()
        return list(self._recorder.history)

    def flush(self) -> list[StepRecord]:
        """As `records()`, but waits for the steps that the device has not finished."""
        self._recorder.wait()
        return self._recorder.drain()

    def add_sink(self, sink: Sink | str | os.PathLike[str]) -> Sink:
        """Hands every record from now on to `sink` when it reaches the host, in order.

        Args:
            sink: `JsonLinesSink`, `TensorBoardSink`, or any callable that takes a `StepRecord`.
                One that raises loses its records, which is logged, and never ends the run. A path
                that ends in `.jsonl` makes a `JsonLinesSink` for that file.

        Returns:
            The sink, so that one made from a path can be closed.

        Raises:
            TypeError: `sink` can be neither called nor written to.
            OSError: The file cannot be opened for writing, or another process writes to it.

        Example:
            >>> import tempfile, torch, fastguard
            >>> p = torch.nn.Parameter(torch.zeros(1))
            >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.1))
            >>> path = tempfile.mkdtemp() + "/records.jsonl"
            >>> sink = opt.add_sink(path)
            >>> opt.step(loss=float("nan"))
            >>> [record.reason for record in fastguard.read_records(path)]
            ['nonfinite_loss']
        """
        sink = sink_of(sink)
        self._recorder.add_sink(sink)
        return sink

    def subscribe(self) -> Inbox:
        """An inbox that gets every record once, for those who act on what happened.

        The run holds it weakly: it is filled as long as the caller keeps it.

        The record of step k is there after step k where the verdict is on the host at once (a CPU,
        or an optimizer that is not fused), else after step k + 1: the same on every rank and every
        rerun. Take records out with `popleft`.
        """
        return self._recorder.subscribe()

    def settle(self) -> None:
        """Waits for all steps so far, so that every inbox holds their records."""
        self._recorder.deliver()

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that take one decision; None: this process decides alone."""
        team = self._gradients.team
        return None if team is None else team.group

    @property
    def watch(self) -> tuple[str, ...]:
        """The names of what is watched."""
        return () if self._watch is None else self._watch.names

    @property
    def watch_every(self) -> int:
        """Steps from one watched step to the next."""
        return WATCH_EVERY if self._watch is None else self._watch.every

    @property
    def steps_taken(self) -> int:
        """Steps so far, skipped ones counted. Never waits."""
        return self._steps_taken

    @property
    def applied_steps(self) -> int:
        """Steps that reached the weights. Waits for a GPU."""
        return guard_state.counter_of(self._state, 1)

    @property
    def skipped_steps(self) -> int:
        """Steps that did not, for whatever reason. Waits for a GPU."""
        return guard_state.counter_of(self._state, 2)

    @property
    def consecutive_skips(self) -> int:
        """Incidents skipped since the last applied step. Waits for a GPU.

        Skips that only lower a loss scale neither count here nor end a row.
        """
        return guard_state.counter_of(self._state, 3)

    @property
    def loss_scale_skips(self) -> int:
        """Those of `skipped_steps` that only lowered a loss scale. Waits for a GPU."""
        return guard_state.counter_of(self._state, 4)

    @property
    def lifetime(self) -> Lifetime:
        """The counts of the whole run, which no rollback and no load lowers. Waits for a GPU.

        `skipped_steps` and the others belong to the state in force, so going back to an earlier one
        takes them back. These are saved with the state: a new process goes on from what they were
        then. Of the counts at hand and those of a state that is loaded, those with more steps hold.

        Example:
            >>> import torch, fastguard
            >>> p = torch.nn.Parameter(torch.zeros(1))
            >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.1))
            >>> start = opt.state_dict()
            >>> opt.step(loss=float("nan"))
            >>> opt.load_state_dict(start)
            >>> opt.skipped_steps, opt.lifetime.skipped
            (0, 1)
        """
        return Lifetime.of(self._state, self._taken_back)

    def _go_on_from(self, state: GuardState, taken_back: Lifetime) -> None:
        """Takes a loaded state, and of its counts and the run's those with more steps."""
        most = max(self.lifetime, Lifetime.of(state, taken_back), key=lambda counts: counts.steps)
        self._state, self._taken_back = state, most.taken_back_of(state)
        self._steps_taken = guard_state.counter_of(state, 0)
        self._recorder.forget_last()

    def _conclude(self) -> None:
        """Ends the step in flight: it is written down if it was taken, and taken back if not.

        May be interrupted at any line, and called again.
        """
        flight = self._flight
        if flight is None:
            return
        taken = flight.is_taken
        if taken and flight.outcome is not None:
            self.last = flight.outcome.verdict
            self._steps_taken = flight.number
            self._recorder.add(flight.outcome)
        else:
            flight.take_back()
        self._stepper.conclude(taken)
        self._flight = None

    def _after_failure(self, error: BaseException) -> None:
        """An exception has left `step`: what it has begun is ended, once more if that is
        interrupted too.
        """
        # GradScaler removes these only after a step that returns, and multiplies its scale onto
        # what it finds.
        self.__dict__.pop("grad_scale", None)
        self.__dict__.pop("found_inf", None)
        if self._flight is not None and isinstance(error, NonFiniteGradError):
            self._flight.use_up_losses()
        try:
            self._conclude()
        except BaseException:
            self._conclude()
            raise
        finally:
            self._deliver(before=False, budget=False)
            self._observed.keep_for_retry()

    def _deliver(self, *, before: bool, budget: bool = True) -> None:
        """Hands the record of a step to those who act on it, and checks the skip budget.

        Where the verdict of step k is on the host at once, after step k; else before step k + 1, by
        waiting for step k, so that every rank and every rerun acts at the same step.
        """
        if self.max_consecutive_skips is None and not self._recorder.has_subscribers:
            return
        on_host = self._device.type == "cpu" or self._stepper.waits
        if before == on_host:
            return
        record = self._recorder.deliver()
        if budget:
            raise_if_over_budget(record, self.max_consecutive_skips)

    @property
    def sync_free(self) -> bool:
        """Whether a step never waits for the device.

        True for fused optimizers and compiled updates without step hooks of their own (but for the
        one step that creates the momentum buffers of SGD, or the state of an optimizer that is not
        torch's), and for every optimizer on a CPU, where there is nothing to wait for; never in
        raise mode on a GPU.
        """
        on_cpu = self._device.type == "cpu"
        return on_cpu or not (self._fitting_stepper().waits or self.nonfinite == "raise")

    def _fitting_stepper(self) -> Stepper:
        """The road for the optimizer as it is now: param groups may have got another `fused`."""
        if not self._stepper.fits():
            self._stepper = stepper_for(self.optimizer)
        return self._stepper

    def describe(self) -> str:
        """What is guarded and how, in one line."""
        parameters = self._gradients.layout.parameters
        elements = sum(p.numel() for p in parameters if not is_lazy(p))
        n_lazy = sum(map(is_lazy, parameters))
        tensors = f"{len(parameters)} tensors" + (f" ({n_lazy} of them lazy)" if n_lazy else "")
        team = self._gradients.team
        deciding = "" if team is None else f"{team.size} ranks decide together; "
        stepper = self._fitting_stepper()
        return (
            f"guarding {type(self.optimizer).__name__}: {tensors}, "
            f"{elements:,} elements on {self._device} ({backend_of(self._device)} backend); "
            f"{self._settings()}; {deciding}"
            f"skips {'after reading the verdict' if stepper.waits else stepper.skips}"
        )

    def __repr__(self) -> str:
        """How it is guarded, and the param groups as torch prints them."""
        inner = type(self.optimizer).__name__
        groups = super().__repr__().partition("(")[2]
        return f"{type(self).__name__} around {inner}, {self._settings()} ({groups}"

    def _settings(self) -> str:
        rules = ", ".join(f"{signal}: {rule}" for signal, rule in self.rules.items()) or "none"
        return (
            f"max_norm={self.max_norm} (p={self.norm_type:g}, {self.clip_scope}), "
            f"nonfinite={self.nonfinite}, spike rules: {rules}"
        )
