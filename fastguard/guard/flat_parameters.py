"""Parameters and optimizer state in flat buffers, laid out as the gradients are.

`FlatGradBuckets` gives each gradient a slot in a buffer. The parameters of one param group whose
slots follow each other form a block: the weights, and each entry of the state that has the shape of
a parameter, get one tensor per block with the same slots. `p.data` and `state[p][...]` are views of
these tensors, so that everyone else sees an ordinary model and an ordinary optimizer.

A run is a stretch of a block that can be updated as one tensor: its parameters all have a gradient,
the same entries in their state and the same step count. While the wrapped optimizer steps, its
param groups hold one tensor per run, so torch's own step makes one fused call with one tensor per
run. State that it creates there for a run is cut into views of the block afterwards.

Memory: padding of up to 12 bytes per tensor, 4 bytes per parameter for its step count. Whenever
slots are laid out anew, the blocks get new memory: the old one may be in use elsewhere (weights
that were swapped with `p.data = ...`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from fastguard.functional.flat_buckets import FlatBuffer, FlatGradBuckets, share_of, slot_in
from fastguard.guard.param_gradients import Gradients
from fastguard.guard.step_hooks import is_hooked

STEP = "step"


@dataclass(slots=True, eq=False)
class _Block:
    """The slots of one param group in one gradient buffer.

    Attributes:
        group: The index of the param group.
        ids: Positions of the parameters in `FlatGradBuckets.parameters`.
        bounds: Where each slot begins in the block, and where the last one ends.
        weights, grads: The parameters and their gradients.
        steps: float32 `(n,)`, the step count of each parameter.
        states: The state, one tensor per entry.
    """

    group: int
    ids: list[int]
    bounds: list[int]
    weights: Tensor
    grads: Tensor
    steps: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)

    def slot(self, key: str, j: int, p: Tensor) -> Tensor:
        """The entry of the state of the j-th parameter; a new one starts with zeros."""
        if key == STEP:
            return self.steps[j]
        if key not in self.states:
            self.states[key] = torch.zeros_like(self.weights)
        return slot_in(self.states[key], self.bounds[j], p)


@dataclass(slots=True, eq=False)
class _Run:
    """Parameters `first` to `last` (exclusive) of a block, updated as one tensor.

    Attributes:
        keys: The entries of their state; empty: they have none yet.
        weights: The parameters; its `.grad` are their gradients.
        entries: The state of the run, views of the block; None before it is asked for.
        others: The step counts of all parameters but the first, with `entries`.
    """

    block: _Block
    first: int
    last: int
    keys: tuple[str, ...]
    weights: Tensor
    entries: dict[str, Tensor] | None = None
    others: Tensor | None = None

    def piece(self, of_block: Tensor) -> Tensor:
        """This run in a tensor of its block."""
        start = self.block.bounds[self.first]
        return of_block.narrow(0, start, self.block.bounds[self.last] - start)

    def state(self) -> dict[str, Tensor]:
        """The state of the run, as the optimizer wants it. The step count is that of its first
        parameter.
        """
        block = self.block
        if self.entries is None:
            self.entries = {
                key: block.steps[self.first] if key == STEP else self.piece(block.states[key])
                for key in self.keys
            }
            self.others = block.steps[self.first + 1 : self.last]
        return dict(self.entries)

    def spread_step(self) -> None:
        """Gives all its parameters the step count of the first one."""
        if self.others is not None and self.entries is not None and STEP in self.keys:
            self.others.copy_(self.entries[STEP])


class FlatParameters:
    """Keeps the parameters and the state of an optimizer in blocks.

    Args:
        optimizer: One of `flat_checks.SERVED`.
        gradients: Its gradients, which are flat.

    Raises:
        TypeError, ValueError: A parameter cannot move into a block.
    """

    def __init__(self, optimizer: Optimizer, gradients: Gradients) -> None:
        self.optimizer = optimizer
        self._gradients = gradients
        self._start()
        self._follow()

    @property
    def on_host(self) -> bool:
        """Whether reading the verdict costs nothing."""
        return all(b.flat.device.type == "cpu" for b in self._flat.buffers)

    @contextmanager
    def runs_in_place_of_parameters(self) -> Iterator[None]:
        """Inside, the `step` of the optimizer works on runs. Its hooks see the parameters."""
        self.show_parameters()
        optimizer, handles = self.optimizer, []
        self._hooked = is_hooked(optimizer)
        try:
            if self._hooked:  # the runs are shown behind the last pre-hook
                handles.append(optimizer.register_step_pre_hook(lambda *_: self._show_runs()))
                last = optimizer.register_step_post_hook(lambda *_: self.show_parameters())
                handles.append(last)
                optimizer._optimizer_step_post_hooks.move_to_end(last.id, last=False)  # type: ignore[attr-defined]
            else:
                self._show_runs()
            yield
        finally:
            self.show_parameters()
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _show_runs(self) -> None:
        if self._shown is not None:
            return
        self._follow()
        optimizer, runs = self.optimizer, self._runs_now()
        groups: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {
            (g, ()): {**own, "params": []} for g, own in enumerate(optimizer.param_groups)
        }
        state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        for run in runs:
            # A group of its own for each set of entries: SGD tells a first step by its group.
            key = (run.block.group, run.keys)
            if key not in groups:
                groups[key] = {**optimizer.param_groups[run.block.group], "params": []}
            groups[key]["params"].append(run.weights)
            if run.keys:
                state[run.weights] = run.state()
        for group in groups.values():
            group.update(fused=True, foreach=None)
        self._shown = runs, state, optimizer.param_groups, optimizer.state
        optimizer.param_groups, optimizer.state = list(groups.values()), state

    @torch.no_grad()
    def show_parameters(self) -> None:
        """Ends what `_show_runs` began. Interrupted, it is done again from the start."""
        if self._shown is None:
            return
        runs, of_runs, groups, state = self._shown
        self.optimizer.param_groups, self.optimizer.state = groups, state
        for run in runs:
            run.spread_step()
            if not run.keys and of_runs.get(run.weights):
                self._take_in(run, of_runs[run.weights])
        self._tell_histories_apart(runs)
        moving = self._moving
        if self._gradients.trusted:
            moving = moving[share_of(len(moving), self._gradients.turn)]
        increment_version(moving)
        self._mark_state()
        self._shown = None

    # Where everything is.

    def _start(self) -> None:
        self._buffers: list[FlatBuffer] | None = None  # those that the blocks mirror
        self._blocks: list[_Block] = []
        self._addresses: list[int] = []
        self._history: dict[int, int] = {}  # by parameter; equal: the same step count
        self._runs: list[_Run] | None = None
        self._absent: list[int] = []  # parameters without a gradient, when the runs were made
        self._moving: list[Tensor] = []  # all others
        self._shown: tuple[list[_Run], Any, Any, Any] | None = None
        self._hooked = False
        self.forget_state()

    @property
    def _flat(self) -> FlatGradBuckets:
        flat = self._gradients.flat
        assert flat is not None
        return flat

    def forget_state(self) -> None:
        """The state of the optimizer may be another one now."""
        self._state: object = None
        self._mark: tuple[int, dict[str, Any]] = (0, {})

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves into blocks what is not there: parameters whose memory was replaced or whose
        gradients were laid out anew, and a state that was loaded.
        """
        flat = self._flat
        if self._gradients.trusted and self._buffers is flat.buffers:
            self._look_at_a_share(flat)
        elif self._buffers is not flat.buffers or self._addresses_now() != self._addresses:
            self._lay_out(flat)
        if self._state_is_another():
            self._take_in_state(flat.parameters)

    def _look_at_a_share(self, flat: FlatGradBuckets) -> None:
        some = share_of(len(flat.parameters), self._gradients.turn)
        parameters, addresses = flat.parameters[some], self._addresses[some]
        for p, address in zip(parameters, addresses, strict=True):
            if p.data_ptr() != address:
                self._gradients.refuse_replaced(p)

    def _addresses_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._flat.parameters))

    def _lay_out(self, flat: FlatGradBuckets) -> None:
        """Gives all parameters slots in new blocks. What is here changes last: interrupted, it is
        done again at the next step.
        """
        self._gradients.check_movable()
        group_of = {
            id(p): g for g, group in enumerate(self.optimizer.param_groups) for p in group["params"]
        }
        groups = [group_of[id(p)] for p in flat.parameters]
        blocks = [block for b in flat.buffers for block in _blocks(b, groups, flat)]
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

    # The state.

    def _state_is_another(self) -> bool:
        state, entries = self.optimizer.state, self._first_entries()
        n, known = self._mark
        return (
            self._state is not state
            or n != len(state)
            or entries.keys() != known.keys()
            or any(known[key] is not value for key, value in entries.items())
        )

    def _mark_state(self) -> None:
        """Remembers what tells that the state is the one in the blocks: how many parameters have
        one, and the entries of the first.
        """
        self._state = self.optimizer.state
        self._mark = len(self.optimizer.state), dict(self._first_entries())

    def _first_entries(self) -> dict[str, Any]:
        return next(filter(None, self.optimizer.state.values()), {})

    def _take_in_state(self, parameters: Sequence[Tensor]) -> None:
        """Moves the state that the optimizer has into the blocks. Waits for a GPU."""
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

    def _take_in(self, run: _Run, created: dict[str, Any]) -> None:
        """Cuts the state that the optimizer has created for a run into that of its parameters."""
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

    # Runs.

    def _runs_now(self) -> list[_Run]:
        """The runs of this step. Gradients that are elsewhere (in DDP's buckets) are copied into
        their slots.
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

    def _runs_of(self, block: _Block, missing: set[int]) -> Iterator[_Run]:
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
            run = _Run(block, slots[0], slots[-1] + 1, what[0], block.weights)
            run.weights = run.piece(block.weights)
            run.weights.grad = run.piece(block.grads)
            yield run

    def _tell_histories_apart(self, runs: list[_Run]) -> None:
        """Where only some parameters took part in a step, their step counts are others now."""
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
        # As with the flat gradients: a copy makes blocks of its own, at its first step.
        return {"optimizer": self.optimizer, "_gradients": self._gradients}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _blocks(buffer: FlatBuffer, groups: Sequence[int], flat: FlatGradBuckets) -> Iterator[_Block]:
    """The blocks that mirror a gradient buffer.

    Args:
        buffer: The buffer.
        groups: The param group of each parameter of `flat`.
        flat: What the buffer belongs to.
    """
    edges = [*(flat.views[i].storage_offset() for i in buffer.ids), len(buffer.flat)]
    for group, members in groupby(range(len(buffer.ids)), lambda j: groups[buffer.ids[j]]):
        slots = list(members)
        first, last = slots[0], slots[-1] + 1
        grads = buffer.flat[edges[first] : edges[last]]
        yield _Block(
            group,
            buffer.ids[first:last],
            [edge - edges[first] for edge in edges[first : last + 1]],
            torch.empty_like(grads),  # the weights come at once: no second write
            grads,
            torch.zeros(last - first, device=grads.device, dtype=torch.float32),
        )
