"""`CompiledStep`: with `compile_step=True`, any optimizer skips on the device in a compiled update.

The update is traced with every write masked by `found_inf` (see `masked_update`), and compiled once
by `torch.compile`. Gradients are scaled as the update reads them, so `.grad` does not change.
Learning rates are inputs, so schedules cause no recompilation; any other number becomes an input
when it changes for the first time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.errors.logger import log
from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.guard.clip_scope import Layout
from fastguard.guard.compiled_state import (
    StateForUpdate,
    check_compiled_parameters,
    dtype_of_numbers,
)
from fastguard.guard.inner_step import StepCall
from fastguard.guard.masked_update import Traced, trace
from fastguard.guard.param_gradients import Gradients
from fastguard.guard.placeholder_optimizer import (
    NUMBERS,
    CountsInPython,
    CreatesState,
    Members,
    NotTraceable,
    Place,
)
from fastguard.guard.read_first import ReadFirst, skips_step
from fastguard.guard.step_hooks import has_step_hooks, run_global_post_hooks, run_global_pre_hooks
from fastguard.stages.contract import Verdict

BACKEND = "inductor"  # backend of torch.compile
MAX_GRAPHS = 16
"""Maximum number of compiled updates per layout; other steps run uncompiled, see `CompiledStep`."""


@dataclass(slots=True)
class _Compiled:
    """A compiled update.

    Attributes:
        layout: The parameters of the guard at that time.
        live: Positions of the parameters with a gradient.
        members: The parameters with a gradient, and the names of their state tensors.
        places: The settings that are inputs.
        static: The settings that the step read as constants.
        traced: The traced graph.
        run: The compiled graph.
        has_run: Whether it has run; the first run compiles it.
    """

    layout: Layout
    live: tuple[int, ...]
    members: Members
    places: tuple[Place, ...]
    static: dict[Place, Any]
    traced: Traced
    run: Callable[..., Any] = field(repr=False)
    has_run: bool = False


class CompiledStep(ReadFirst):
    """Runs the update of an optimizer as one compiled graph that applies the verdict itself.

    In three cases, the step reads the verdict first and calls the optimizer without compilation:

    - The step creates state without a known initial value. This is the case for optimizers from
      outside torch; for SGD with momentum and dampening, whose first step uses another formula; and
      for ASGD and Rprop, whose initial state depends on the learning rate.
    - The optimizer has step hooks, which must run only when it steps.
    - `MAX_GRAPHS` updates have been compiled.

    Args:
        optimizer: The wrapped optimizer.
        gradients: The gradients of the optimizer.
    """

    skips = "through found_inf in a compiled update"

    def __init__(self, optimizer: Optimizer, gradients: Gradients) -> None:
        super().__init__(optimizer)
        self._gradients = gradients
        self._state = StateForUpdate(optimizer)
        self._graphs: list[_Compiled] = []  # most recently used first
        self._n_compiled = 0
        self._moving: set[Place] = set()  # numbers that have changed between steps
        self._fixed: set[Place] = set()  # numbers that cannot be tensors in the step
        self._numbers: dict[Place, tuple[float, Tensor]] = {}
        self._n_creating = Counter[tuple[int, ...]]()  # by parameters with a gradient
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without compiled code, which cannot be copied; copies recompile."""
        state = {**self.__dict__, "_graphs": [], "_n_compiled": 0, "_numbers": {}}
        return state

    @property
    def reads_first(self) -> bool:
        """Whether steps may read the verdict first, because of hooks or `MAX_GRAPHS`."""
        return self._n_compiled >= MAX_GRAPHS or has_step_hooks(self.optimizer)

    def fits(self) -> bool:
        """Returns True: the update does not depend on settings such as `fused`."""
        return True

    def reset(self) -> None:
        """Drops graphs of other parameters, and graphs that contain constants of the state."""
        layout = self._gradients.layout
        self._graphs = [
            g for g in self._graphs if g.layout is layout and not g.members.has_constants
        ]
        self._n_creating.clear()
        if not self._graphs:
            self._n_compiled = 0

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Runs the compiled update; compiles it first if needed.

        Raises:
            TypeError: The update cannot be traced, or `step` got arguments for the wrapped
                optimizer; nothing was changed.
        """
        _refuse_arguments(self.optimizer, call)
        graph, inputs, live = None, None, ()
        if not has_step_hooks(self.optimizer) and has_numbers(verdict.found_inf):
            live = tuple(
                i for i, p in enumerate(self._gradients.layout.parameters) if p.grad is not None
            )
            if live:
                graph, inputs = self._graph_for(live)
        if graph is None or inputs is None:
            super().step(buckets, verdict, call, changes)
            self._n_creating[live] += not skips_step(verdict)
            return
        n_segments = self._gradients.layout.n_segments
        multiplier = verdict.multiplier.expand(n_segments)
        run_global_pre_hooks(self.optimizer)
        start = None if graph.has_run else time.perf_counter()
        # On a CPU, found_inf and clean may be the same tensor, and dynamo would recompile for a
        # step in which they are not. The view makes them two tensors in every step.
        args = verdict.found_inf, multiplier, verdict.clean.view(()), *inputs
        # a single line, so that no interrupt can separate the two calls
        call.returned.append(graph.run(*args) or None)
        graph.has_run = True
        if start is not None:
            log.info(
                "compiled the update of %s over %d tensors in %.1f s",
                type(self.optimizer).__name__,
                len(graph.live),
                time.perf_counter() - start,
            )
        run_global_post_hooks(self.optimizer)

    def conclude(self, taken: bool) -> None:
        """Marks the optimizer as stepped for a scheduler that was created with it."""
        if taken and hasattr(self.optimizer.step, "_wrapped_by_lr_sched"):
            self.optimizer._opt_called = True  # type: ignore[attr-defined]

    # Finds the graph.

    def _graph_for(self, live: tuple[int, ...]) -> tuple[_Compiled | None, list[Tensor] | None]:
        """Returns the graph for these parameters and the current settings, and its inputs.

        None: the step must be taken without a graph.
        """
        graph = self._known(live)
        if graph is None:
            if self._n_compiled >= MAX_GRAPHS:
                self._warn_of_limit()
                return None, None
            self._note_moving(live)
            graph = self._new(live)
            if graph is None:
                return None, None
            self._n_compiled += 1
        if self._graphs[:1] != [graph]:
            self._graphs = [graph, *(g for g in self._graphs if g is not graph)]
        inputs = self._inputs(graph)
        if inputs is None:  # a loaded state lacks entries, or has numbers in place of tensors
            self._graphs.remove(graph)
            return self._graph_for(live)
        return graph, inputs

    def _known(self, live: tuple[int, ...]) -> _Compiled | None:
        layout, groups = self._gradients.layout, self.optimizer.param_groups
        for graph in self._graphs:
            if graph.layout is not layout or graph.live != live:
                continue
            if graph.static == self._constants(graph.traced, graph.places) and all(
                b.holds(b.setting.value_in(groups[b.setting.owner])) for b in graph.traced.branches
            ):
                return graph
        return None

    def _note_moving(self, live: tuple[int, ...]) -> None:
        """Finds the numbers in the settings that have changed since an earlier graph."""
        for graph in self._graphs:
            if graph.live != live:
                continue
            now = self._constants(graph.traced, graph.places)
            if now.keys() != graph.static.keys():
                continue
            changed = {place for place, value in now.items() if value != graph.static[place]}
            if all(p.of_group and type(now[p]) is type(graph.static[p]) is float for p in changed):
                self._moving |= changed
                return

    def _new(self, live: tuple[int, ...]) -> _Compiled | None:
        """Returns a new graph for these parameters; None: state must be created first.

        Raises:
            TypeError: The update cannot be traced; nothing was changed.
        """
        layout = self._gradients.layout
        check_compiled_parameters(layout.parameters)
        params = [layout.parameters[i] for i in live]
        segments = [0 if layout.segments is None else layout.segments[i] for i in live]
        numbers = [n for n, g in enumerate(self.optimizer.param_groups) for _ in g["params"]]
        owners = [numbers[i] for i in live]
        undo = self._state.copy(params)
        try:
            self._state.prepare(params, owners)
            return self._traced(layout, live, params, owners, segments)
        except CreatesState as error:
            undo()
            if self._n_creating[live] > 2:
                raise TypeError(self._refusal(f"in every step, {error}")) from None
            return None
        except NotTraceable as error:
            undo()
            raise TypeError(self._refusal(str(error))) from error
        except BaseException:
            undo()
            raise

    def _traced(
        self,
        layout: Layout,
        live: tuple[int, ...],
        params: list[Tensor],
        owners: list[int],
        segments: list[int],
    ) -> _Compiled:
        while True:
            members = Members.of(self.optimizer, params, owners, segments)
            places = self._places()
            try:
                traced = trace(self.optimizer, members, self._settings(places))
                break
            except CountsInPython as error:
                self._state.count_in_tensors(params, error.places)
            except NotTraceable:
                movable = self._moving - self._fixed
                if not movable:
                    raise
                self._fixed |= movable  # trace again with these numbers as constants
        static = self._constants(traced, places)
        run = torch.compile(traced.graph, backend=BACKEND, fullgraph=True, dynamic=False)
        return _Compiled(layout, live, members, places, static, traced, run)

    def _refusal(self, reason: str) -> str:
        return (
            f"compile_step=True does not support {type(self.optimizer).__name__}: {reason}; "
            "nothing was changed; remove compile_step"
        )

    def _warn_of_limit(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "%d updates of %s have been compiled, because settings or the set of parameters "
                "with a gradient keep changing; steps that need another compiled update run "
                "uncompiled, after reading the verdict",
                MAX_GRAPHS,
                type(self.optimizer).__name__,
            )

    def _constants(self, traced: Traced, places: tuple[Place, ...]) -> dict[Place, Any]:
        """Returns the values that a graph depends on as constants.

        These are the attributes of the optimizer and the settings that the step reads. For a
        setting that is an input of the graph, only its kind (tensor or number) matters, not its
        value.
        """
        inputs = set(places)
        constants: dict[Place, Any] = {
            Place(0, name, of_group=False): value
            for name, value in vars(self.optimizer).items()
            if name[0] != "_" and type(value) in (*NUMBERS, bool, str)
        }
        groups = self.optimizer.param_groups
        for i, (group, keys) in enumerate(zip(groups, traced.read, strict=True)):
            for key in keys - {"params"}:
                value = group.get(key)
                items = enumerate(value) if isinstance(value, tuple | list) else [(None, value)]
                for item, single in items:
                    place = Place(i, key, item=item)
                    is_tensor = isinstance(single, Tensor)
                    constants[place] = is_tensor if is_tensor or place in inputs else single
        return constants

    # Collects the inputs.

    def _inputs(self, graph: _Compiled) -> list[Tensor] | None:
        try:
            inputs = graph.members.inputs(self.optimizer)
        except KeyError:
            return None
        if not all(map(torch.is_tensor, inputs)):
            return None
        return [*inputs, *self._settings(graph.places).values()]

    def _places(self) -> tuple[Place, ...]:
        """Returns the settings that are inputs: tensors, learning rates, and changing numbers."""
        places = []
        for i, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, Tensor) or (key == "lr" and type(value) in NUMBERS):
                    places.append(Place(i, key))
        return (*places, *sorted(self._moving - self._fixed))

    def _settings(self, places: tuple[Place, ...]) -> dict[Place, Tensor]:
        """Returns a tensor per place; for a number, a cached one that is refilled when it changes.

        Never waits: `fill_` passes a number to the GPU as a kernel argument.
        """
        tensors: dict[Place, Tensor] = {}
        for place in places:
            value = place.value_in(self.optimizer.param_groups[place.owner])
            if isinstance(value, Tensor):
                tensors[place] = value
                continue
            known = self._numbers.get(place)
            if known is None:
                first = self._gradients.layout.parameters[0]
                dtype = dtype_of_numbers(self._gradients.layout.parameters)
                known = (value, torch.full((), value, dtype=dtype, device=first.device))
            elif known[0] != value:
                known[1].fill_(value)
            self._numbers[place] = (value, known[1])
            tensors[place] = known[1]
        return tensors


def _refuse_arguments(optimizer: Optimizer, call: StepCall) -> None:
    given = [x for x in (*call.args, *call.kwargs.values()) if x is not None]
    if given:
        raise TypeError(
            f"step got {len(given)} arguments for {type(optimizer).__name__}.step, which a "
            "compiled update does not support; remove compile_step"
        )
