"""`FlatParameters`: parameters and optimizer state in flat buffers, laid out as the gradients are.

`FlatGradBuckets` gives each gradient a slot in a buffer. The parameters of one param group with
adjacent slots form a block. Per block there is one tensor for the weights, and one for each state
entry that has the shape of a parameter, with the same slots. `p.data` and `state[p][...]` are views
of these tensors, so that model and optimizer look ordinary to all other code.

A run is a part of a block that can be updated as one tensor: its parameters all have a gradient,
the same state entries and the same step count. During the step of the wrapped optimizer, its param
groups hold one tensor per run, so that torch makes one fused call. State that torch creates for a
run is split into views of the block afterward.

Memory, per parameter tensor: up to 12 bytes of padding, and 4 bytes for its step count. When slots
are laid out again, blocks get new memory, because the old memory may still be in use (by weights
that were swapped with `p.data = ...`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from fastguard.functional.flat_buckets import FlatGradBuckets
from fastguard.functional.flat_layout import FlatBuffer, first_difference, share_of, slot_in
from fastguard.guard.flat_blocks import STEP, Block, Run, blocks_of
from fastguard.guard.param_gradients import Gradients
from fastguard.guard.step_hooks import is_hooked, without_grad

DuringStep = tuple[list[Run], Any, Any, Any]
"""Saved during a step: the runs with their state, and the optimizer's param groups with theirs.
"""


class FlatParameters:
    """Keeps the parameters and the state of an optimizer in blocks.

    Args:
        optimizer: An optimizer of a class in `flat_checks.SERVED`.
        gradients: The gradients of the optimizer, in flat buckets.

    Raises:
        TypeError, ValueError: A parameter cannot move into a block.
    """

    def __init__(self, optimizer: Optimizer, gradients: Gradients) -> None:
        self.optimizer = optimizer
        self._gradients = gradients
        self._start()
        self._move_into_blocks()

    @property
    def on_host(self) -> bool:
        """Whether the gradients are on a CPU, where reading the verdict costs nothing."""
        return all(b.flat.device.type == "cpu" for b in self._flat.buffers)

    def weights(self) -> list[Tensor] | None:
        """Returns all parameters in as few tensors as possible, with zeros between them.

        None if the memory of a parameter may have been replaced since the last step.
        """
        flat = self._flat
        moved = not self._gradients.trusted and self._addresses_now() != self._addresses
        if moved or self._buffers is not flat.buffers:
            return None
        return [*(block.weights for block in self._blocks), *flat._left_out]

    @torch.no_grad()
    def release(self) -> None:
        """Gives every parameter its own memory; the next step moves all into blocks again."""
        self._buffers = None
        for p in self._flat.parameters:
            p.data = p.data.clone()

    def call_with_runs(self, step: Callable[[], None]) -> None:
        """Calls `step`, the step of the optimizer, on runs in place of parameters.

        Hooks of the optimizer see parameters.
        """
        self.show_parameters()
        optimizer, handles = self.optimizer, []
        self._hooked = is_hooked(optimizer)
        try:
            if self._hooked:  # the runs are shown after the last pre-hook
                handles.append(optimizer.register_step_pre_hook(lambda *_: self._show_runs()))
                last = optimizer.register_step_post_hook(lambda *_: self.show_parameters())
                handles.append(last)
                optimizer._optimizer_step_post_hooks.move_to_end(last.id, last=False)  # type: ignore[attr-defined]
            else:
                self._show_runs()
            step()
        finally:
            self.show_parameters()
            for handle in handles:
                handle.remove()

    @without_grad
    def _show_runs(self) -> None:
        if self._during_step is not None:
            return
        self._move_into_blocks()
        optimizer, runs = self.optimizer, self._runs_now()
        groups: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {
            (g, ()): {**own, "params": []} for g, own in enumerate(optimizer.param_groups)
        }
        state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        for run in runs:
            # A separate group per set of entries, since SGD detects a first step per group.
            key = (run.block.group, run.keys)
            if key not in groups:
                groups[key] = {**optimizer.param_groups[run.block.group], "params": []}
            groups[key]["params"].append(run.weights)
            if run.keys:
                state[run.weights] = run.state()
        for group in groups.values():
            group.update(fused=True, foreach=None)
        self._during_step = runs, state, optimizer.param_groups, optimizer.state
        optimizer.param_groups, optimizer.state = list(groups.values()), state

    def show_parameters(self) -> None:
        """Reverts `_show_runs`. After an interrupt, the next call starts from the beginning."""
        if self._during_step is not None:
            self._revert(self._during_step)

    @without_grad
    def _revert(self, during_step: DuringStep) -> None:
        runs, of_runs, groups, state = during_step
        self.optimizer.param_groups, self.optimizer.state = groups, state
        for run in runs:
            run.spread_step()
            if not run.keys and of_runs.get(run.weights):
                self._split_created(run, of_runs[run.weights])
        self._update_histories(runs)
        moving = self._moving
        if self._gradients.trusted:
            moving = moving[share_of(len(moving), self._gradients.turn)]
        increment_version(moving)
        self._mark_state()
        self._during_step = None

    # Builds the blocks.

    def _start(self) -> None:
        self._buffers: list[FlatBuffer] | None = None  # gradient buffers with the same layout
        self._blocks: list[Block] = []
        self._addresses: list[int] = []
        self._history: dict[int, int] = {}  # parameters with equal numbers have equal step counts
        self._runs: list[Run] | None = None
        self._absent: list[int] = []  # parameters without a gradient in the current runs
        self._moving: list[Tensor] = []  # all other parameters
        self._during_step: DuringStep | None = None
        self._hooked = False
        self.forget_state()

    @property
    def _flat(self) -> FlatGradBuckets:
        flat = self._gradients.flat
        assert flat is not None
        return flat

    def forget_state(self) -> None:
        """Marks the state of the optimizer as possibly replaced."""
        self._state: object = None
        self._mark: tuple[int, dict[str, Any]] = (0, {})

    def _move_into_blocks(self) -> None:
        """Moves parameters and state into blocks if they are elsewhere.

        They are elsewhere after the memory of a parameter was replaced, after gradients were laid
        out again, and after a state was loaded.
        """
        flat = self._flat
        if self._gradients.trusted and self._buffers is flat.buffers:
            self._check_share(flat)
        elif self._buffers is not flat.buffers or self._addresses_now() != self._addresses:
            self._lay_out(flat)
        if self._has_other_state():
            self._adopt_state(flat.parameters)

    def _check_share(self, flat: FlatGradBuckets) -> None:
        """Raises a RuntimeError if the memory of a parameter in the current share was replaced."""
        some = share_of(len(flat.parameters), self._gradients.turn)
        parameters, known = flat.parameters[some], self._addresses[some]
        now = list(map(Tensor.data_ptr, parameters))
        if now != known:
            self._gradients.refuse_replaced(parameters[first_difference(now, known)])

    def _addresses_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._flat.parameters))

    @torch.no_grad()
    def _lay_out(self, flat: FlatGradBuckets) -> None:
        """Moves all parameters into new blocks.

        The attributes are set last, so that after an interrupt the next step starts the move again.
        """
        self._gradients.check_movable()
        group_of = {
            id(p): g for g, group in enumerate(self.optimizer.param_groups) for p in group["params"]
        }
        groups = [group_of[id(p)] for p in flat.parameters]
        blocks = [block for b in flat.buffers for block in blocks_of(b, groups, flat)]
        for block in blocks:
            for i, (start, stop) in zip(block.ids, pairwise(block.bounds), strict=True):
                p = flat.parameters[i]
                slot = slot_in(block.weights, start, p)
                slot.copy_(p)
                block.weights[start + p.numel() : stop] = 0.0
                p.data = slot
        self.forget_state()
        self._runs = None
        self._blocks = blocks
        self._addresses = self._addresses_now()
        self._buffers = flat.buffers

    # Splits and tracks the state.

    def _has_other_state(self) -> bool:
        state, entries = self.optimizer.state, self._first_entries()
        n, known = self._mark
        return (
            self._state is not state
            or n != len(state)
            or entries.keys() != known.keys()
            or not all(map(is_, entries.values(), known.values()))
        )

    def _mark_state(self) -> None:
        """Remembers the current state, so that `_has_other_state` detects a replaced one.

        Keeps the number of parameters with state, and the state entries of the first such
        parameter.
        """
        self._state = self.optimizer.state
        self._mark = len(self.optimizer.state), dict(self._first_entries())

    def _first_entries(self) -> dict[str, Any]:
        return next(filter(None, self.optimizer.state.values()), {})

    @torch.no_grad()
    def _adopt_state(self, parameters: Sequence[Tensor]) -> None:
        """Moves the state of the optimizer into the blocks. Waits for a GPU."""
        state = self.optimizer.state
        ids: dict[float, int] = {}
        for block in self._blocks:
            block.states, block.steps = {}, torch.zeros_like(block.steps)
            for j, i in enumerate(block.ids):
                p = parameters[i]
                for key, value in list(state.get(p, {}).items()):
                    if isinstance(value, Tensor):
                        slot = block.slot(key, j, p)
                        slot.copy_(value)
                        state[p][key] = slot
            for i, step in zip(block.ids, block.steps.tolist(), strict=True):
                self._history[i] = ids.setdefault(step, len(ids))
        self._runs = None
        self._mark_state()

    def _split_created(self, run: Run, created: dict[str, Any]) -> None:
        """Splits the state that the optimizer has created for a run among its parameters."""
        block, state = run.block, self.optimizer.state
        tensors = {key: value for key, value in created.items() if isinstance(value, Tensor)}
        for key, value in tensors.items():
            if key == STEP:
                block.steps[run.first : run.last] = value
            elif value.shape == block.weights.shape:  # the run is the whole block
                block.states[key] = value
            else:
                if key not in block.states:
                    block.states[key] = torch.zeros_like(block.weights)
                run.piece(block.states[key]).copy_(value)
        for j in range(run.first, run.last):
            p = self._flat.parameters[block.ids[j]]
            for key in tensors:
                state[p][key] = block.slot(key, j, p)
        self._runs = None

    # Builds the runs.

    def _runs_now(self) -> list[Run]:
        """Returns the runs of this step.

        Gradients in other memory, such as DDP's buckets, are copied into their slots.
        """
        flat, absent = self._flat, []
        if self._hooked or not flat.in_place:
            for i, (p, view) in enumerate(zip(flat.parameters, flat.views, strict=True)):
                if p.grad is None:
                    absent.append(i)
                elif p.grad is not view:
                    view.copy_(p.grad)
        if self._runs is None or absent != self._absent:
            missing = set(absent)
            self._runs = [run for b in self._blocks for run in self._runs_of(b, missing)]
            self._absent = absent
            self._moving = [p for i, p in enumerate(flat.parameters) if i not in missing]
        return self._runs

    def _runs_of(self, block: Block, missing: set[int]) -> Iterator[Run]:
        state, parameters = self.optimizer.state, self._flat.parameters

        def kind(j: int) -> tuple[tuple[str, ...], int] | None:
            i = block.ids[j]
            if i in missing:
                return None
            own = state.get(parameters[i], {}).items()
            keys = tuple(key for key, value in own if isinstance(value, Tensor))
            return keys, self._history[i] if STEP in keys else 0

        for what, members in groupby(range(len(block.ids)), kind):
            if what is None:
                continue
            slots = list(members)
            run = Run(block, slots[0], slots[-1] + 1, what[0], block.weights)
            run.weights = run.piece(block.weights)
            run.weights.grad = run.piece(block.grads)
            yield run

    def _update_histories(self, runs: list[Run]) -> None:
        """Updates `_history` after a step in which only some parameters had gradients."""
        if not self._absent:
            return
        fresh: dict[int, int] = {}
        used = max(self._history.values(), default=0) + 1
        for run in runs:
            for i in run.block.ids[run.first : run.last]:
                old = self._history[i]
                self._history[i] = fresh.setdefault(old, used + len(fresh))
        self._runs = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy creates its own blocks in its first step, as `FlatGradBuckets` creates its own
        # buffers.
        return {"optimizer": self.optimizer, "_gradients": self._gradients}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
