"""`ReportingOptimizer`: records, counters and properties of a guarded run.

It also concludes each step: writes its record or undoes it, and delivers records to subscribers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch.amp.grad_scaler import GradScaler
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
from fastguard.guard.watch.watch import Watch
from fastguard.guard.wrapper import OptimizerWrapper
from fastguard.ranks.groups import Group
from fastguard.records.json_lines_sink import sink_of, tell_guard
from fastguard.records.losses import ObservedLosses
from fastguard.records.recorder import Recorder
from fastguard.records.step_record import StepRecord
from fastguard.records.subscription import Inbox
from fastguard.stages.backend import backend_of
from fastguard.stages.contract import GuardState, NonFinite, Verdict
from fastguard.stages.spike_rules import Rule

Sink = Callable[[StepRecord], object]


class ReportingOptimizer(OptimizerWrapper):
    """An optimizer that keeps records of its steps."""

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
    _scaler: ref[GradScaler] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ReportingOptimizer:
        """Copies all attributes except process groups, which cannot be copied and are shared."""
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
        """Returns the records of finished steps since the last call, oldest first.

        Never waits. Use `history` to read records without removing them.

        Returns: Each record once. On a GPU, the newest steps may still be missing, see `flush`.
        """
        return self._recorder.drain()

    @property
    def history(self) -> list[StepRecord]:
        """The last 4096 records of finished steps, oldest first; does not affect `records()`.

        Includes steps that a load or a rollback has taken back. Never waits; other threads may read
        it during a step.
        """
        self._recorder.poll()
        return list(self._recorder.history)

    def flush(self) -> list[StepRecord]:
        """Like `records()`, but waits for all steps so far.

        Returns:
            The records since the last call of either, oldest first.
        """
        self._recorder.wait()
        return self._recorder.drain()

    def add_sink(self, sink: Sink | str | os.PathLike[str]) -> Sink:
        """Passes every record from now on to `sink`, in order, once it reaches the host.

        Args:
            sink: `JsonLinesSink`, `TensorBoardSink`, or any callable that takes a `StepRecord`. If
                it raises, its records are lost and this is logged, but training continues. A path
                that ends in `.jsonl` creates a `JsonLinesSink` for that file.

        Returns:
            The sink, for example to close one that was created from a path.

        Raises:
            TypeError: `sink` is neither callable nor a path.
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
        tell_guard(sink, self.describe(), self._device)
        self._recorder.add_sink(sink)
        return sink

    def subscribe(self) -> Inbox:
        """Returns an inbox that receives every record, for code that reacts to steps.

        The guard holds only a weak reference, so records arrive as long as the caller keeps the
        inbox. Remove records with `popleft`.

        The record of step k arrives after step k if every step reads the verdict on the host (on a
        CPU, or with an optimizer that is not fused), otherwise after step k + 1; the timing is the
        same on all ranks and in all reruns.
        """
        return self._recorder.subscribe()

    def settle(self) -> None:
        """Waits for all steps so far, so that every inbox has their records."""
        self._recorder.deliver()

    @property
    def scaler_in_use(self) -> GradScaler | None:
        """The `GradScaler` that called `step` last; None: there is none."""
        return None if self._scaler is None else self._scaler()

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that decide together; None: this process decides alone."""
        team = self._gradients.team
        return None if team is None else team.group

    @property
    def watch(self) -> tuple[str, ...]:
        """The names of the watched quantities."""
        return () if self._watch is None else self._watch.names

    @property
    def watch_every(self) -> int | None:
        """Interval in steps at which they are read; None: 1 for replica drift, 100 for others."""
        return None if self._watch is None else self._watch.every

    @property
    def steps_taken(self) -> int:
        """Number of steps so far, including skipped ones. Never waits."""
        return self._steps_taken

    @property
    def applied_steps(self) -> int:
        """Number of applied steps. Waits for a GPU."""
        return guard_state.counter_of(self._state, 1)

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps, for any reason. Waits for a GPU."""
        return guard_state.counter_of(self._state, 2)

    @property
    def consecutive_skips(self) -> int:
        """Number of incidents skipped since the last applied step. Waits for a GPU.

        Skips that only lower a loss scale neither count nor reset this number.
        """
        return guard_state.counter_of(self._state, 3)

    @property
    def loss_scale_skips(self) -> int:
        """Number of skipped steps that only lowered a loss scale. Waits for a GPU."""
        return guard_state.counter_of(self._state, 4)

    @property
    def lifetime(self) -> Lifetime:
        """The step counts of the whole run, which loading and rollbacks do not lower.

        In contrast, `skipped_steps` and the other counters belong to the current state, and go back
        when an earlier state is loaded. The lifetime is saved in the state dict too; if the current
        lifetime and the loaded one differ, the one with more steps is kept. Waits for a GPU.

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
        """Continues from a loaded state, with the lifetime that has more steps."""
        most = max(self.lifetime, Lifetime.of(state, taken_back), key=lambda counts: counts.steps)
        self._state, self._taken_back = state, most.taken_back_of(state)
        self._steps_taken = guard_state.counter_of(state, 0)
        self._recorder.forget_last()

    def _conclude(self) -> None:
        """Concludes the step in flight: records it if it was taken, otherwise undoes it.

        This method may be interrupted at any line and called again.
        """
        flight = self._flight
        if flight is None:
            return
        taken = flight.is_taken
        if taken and flight.outcome is not None:
            outcome = flight.concluded(flight.outcome)
            self.last = outcome.verdict
            self._steps_taken = flight.number
            self._recorder.add(outcome)
        else:
            flight.take_back()
        self._stepper.conclude(taken)
        self._flight = None

    def _after_failure(self, error: BaseException) -> None:
        """Concludes the step after an exception in `step`; it is called again if interrupted."""
        # GradScaler removes these attributes only after a step that returns. In the next step it
        # would multiply the remaining grad_scale by its scale.
        self.__dict__.pop("grad_scale", None)
        self.__dict__.pop("found_inf", None)
        if self._flight is not None and isinstance(error, NonFiniteGradError):
            self._flight.use_up_losses()
        try:
            self._conclude()
        finally:
            self._deliver(before=False, budget=False)
            self._observed.keep_for_retry()

    def _deliver(self, *, before: bool, budget: bool = True) -> None:
        """Delivers the record of a step to subscribers, and checks the skip budget.

        If every step reads the verdict on the host, the record of step k is delivered after step k.
        Otherwise it is delivered before step k + 1, after waiting for step k. So all ranks and all
        reruns react in the same step.
        """
        if self.max_consecutive_skips is None and not self._recorder.has_subscribers:
            return
        on_host = self._device.type == "cpu" or self._stepper.reads_first
        if before == on_host:
            return
        record = self._recorder.deliver()
        if budget:
            raise_if_over_budget(record, self.max_consecutive_skips)

    @property
    def sync_free(self) -> bool:
        """Whether steps never wait for the device.

        True on a CPU, where there is nothing to wait for. On a GPU, True for fused optimizers and
        compiled updates, unless the wrapped optimizer has step hooks or `nonfinite="raise"`. Even
        if True, one step waits: the step that creates the momentum buffers of SGD, or with
        `compile_step` the state of ASGD, Rprop, or an optimizer that is not torch's own.
        """
        on_cpu = self._device.type == "cpu"
        return on_cpu or not (self._fitting_stepper().reads_first or self.nonfinite == "raise")

    def _fitting_stepper(self) -> Stepper:
        """Returns the stepper for the current settings, such as `fused` in the param groups."""
        if not self._stepper.fits():
            self._stepper = stepper_for(self.optimizer)
        return self._stepper

    def describe(self) -> str:
        """Returns one line that describes the guarded tensors and the settings."""
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
            f"skips {'after reading the verdict' if stepper.reads_first else stepper.skips}"
        )

    def __repr__(self) -> str:
        """Returns the settings of the guard, and the param groups as torch prints them."""
        inner = type(self.optimizer).__name__
        groups = super().__repr__().partition("(")[2]
        return f"{type(self).__name__} around {inner}, {self._settings()} ({groups}"

    def _settings(self) -> str:
        rules = ", ".join(f"{signal}: {rule}" for signal, rule in self.rules.items()) or "none"
        return (
            f"max_norm={self.max_norm} (p={self.norm_type:g}, {self.clip_scope}), "
            f"nonfinite={self.nonfinite}, spike rules: {rules}"
        )
