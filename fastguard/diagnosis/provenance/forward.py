"""`ForwardTrace`: finds the operation of a forward pass that produced the first non-finite value.

Every ATen operation passes through here, below autograd and autocast. An operation with a
non-finite output becomes an `Event`, which stores which inputs were non-finite and which events
produced these inputs. From a bad loss, the trace leads back to the origins, which are events with
finite inputs. Non-finite values that never reach the loss are not on such a path and are not
reported.

A -Inf that the program *wrote* (an attention mask: `masked_fill(mask, -inf)`) is `placed`. An
operation that writes a placed -Inf or passes it on is not an origin. An operation that computes a
NaN from it (the softmax of a row of -Inf) is an origin.
"""

from __future__ import annotations

import linecache
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastguard.diagnosis.provenance.circumstances import Explanation, explain_call
from fastguard.diagnosis.provenance.report import Origin
from fastguard.diagnosis.replay.calls import LOW, Call, all_finite, floats, is_view, storage_of
from fastguard.diagnosis.replay.tensor_range import TensorRange, as_real

_NOT_USER = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
_UNINITIALIZED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_DESCRIBED = 8  # maximum number of inputs and outputs to describe


@dataclass(frozen=True, slots=True)
class Site:
    """The place where an operation was called.

    Attributes:
        module: Name and class of the innermost module.
        source: `file:line in function: text` of the innermost line outside torch.
    """

    module: str
    source: str | None


@dataclass(frozen=True, slots=True)
class Outside:
    """A non-finite tensor that no operation of the pass produced."""

    origin: Origin
    range: TensorRange
    placed: bool


@dataclass(frozen=True, slots=True)
class Event:
    """An operation with a non-finite output.

    Attributes:
        index: Number of the operation.
        operation: `aten.div.Tensor`.
        causes: The causes of the non-finite inputs.
        placed: Whether the operation wrote, or passed on, an Inf that the program wrote
            deliberately.
        inputs, outputs: Ranges, which are recorded only at origins.
        precision: Whether float32 would have been finite; None if not tried.
        explanation: The explanation by the arguments; None if only ranges can explain the output.
    """

    index: int
    operation: str
    site: Site
    causes: tuple[Event | Outside, ...]
    placed: bool
    inputs: tuple[TensorRange, ...] = ()
    outputs: tuple[TensorRange, ...] = ()
    precision: bool | None = None
    explanation: Explanation | None = None

    @property
    def is_origin(self) -> bool:
        """Whether the operation made finite values non-finite, or a deliberate Inf NaN."""
        return not self.placed and all(cause.placed for cause in self.causes)


Cause = Event | Outside


class ForwardTrace(TorchDispatchMode):
    """Records the operations of a forward pass.

    Args:
        names: Names of modules.
        outside: `(origin, name, tensor)` of every tensor that exists before the pass.
    """

    def __init__(
        self, names: dict[nn.Module, str], outside: Iterable[tuple[Origin, str, Tensor]]
    ) -> None:
        super().__init__()
        self.low_precision: bool = False
        self.sites: dict[int, Site] = {}  # by sequence number of the autograd node
        self._names = names
        self._stack: list[str] = []
        self._calls: dict[nn.Module, int] = {}
        self._index = 0
        # Cause of the tensor in each storage; None if finite. Reused addresses are safe, since an
        # operation writes the new storage before another one reads it.
        self._known: dict[int, Cause | None] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._thread = threading.get_ident()
        self._outermost = sys._getframe(1)
        self.already: list[Any] = [self._check_new(t, origin, name) for origin, name, t in outside]

    def __enter__(self) -> ForwardTrace:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    # Tracks the current position.

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(module)
        kind = type(module).__name__
        calls = self._calls[module] = self._calls.get(module, 0) + 1
        again = f", call {calls}" if calls > 1 else ""
        self._stack.append(f"{kind}{again}" if name is None else f"{name} ({kind}{again})")

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def _site(self) -> Site:
        return Site(self._stack[-1] if self._stack else "", self._source())

    def _source(self) -> str | None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._outermost:
            code = frame.f_code
            if not code.co_filename.startswith(_NOT_USER) and code.co_filename[:1] != "<":
                text = linecache.getline(code.co_filename, frame.f_lineno).strip()
                return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}: {text}"
            frame = frame.f_back
        return None

    # Records operations.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Autograd numbers a node before its operation runs; the next operation belongs to it.
        node = torch.autograd._get_sequence_nr() - 1
        if node not in self.sites:
            self.sites[node] = self._site()
        if is_view(func):
            out = func(*args, **kwargs)
            if func is torch.ops.aten.lift_fresh.default:  # this operation creates a constant
                self._known.pop(storage_of(out), None)
            return out
        call = Call.of(func, args, kwargs)
        for _, tensor in call.inputs:
            self._check_new(tensor)
        call.save_overwritten()
        out = func(*args, **kwargs)
        self._index += 1
        outputs = floats(out)
        self.low_precision |= any(t.dtype in LOW for t in outputs)
        with torch.no_grad():
            bad = [t for t in outputs if not all_finite(t)]
            event = self._event(call, outputs) if bad else None
        for tensor in outputs:
            self._learn(tensor, event if any(t is tensor for t in bad) else None, call)
        return out

    def _event(self, call: Call, outputs: Sequence[Tensor]) -> Event:
        bad_inputs = [(t, v) for _, t, v in call.read() if not all_finite(v)]
        causes = tuple(
            self._known.get(storage_of(t))
            or Outside("constant", TensorRange.of("a tensor", v), False)
            for t, v in bad_inputs
        )
        has_nan = any(bool(as_real(t).isnan().any()) for t in outputs)
        is_requested = any(math.isinf(x) for x in call.numbers)
        placed = (
            not has_nan
            and (is_requested or bool(causes))
            and all(cause.placed for cause in causes)
            and call.name not in _UNINITIALIZED
        )
        event = Event(self._index, str(call.func), self._site(), causes, placed)
        if not event.is_origin:
            return event
        inputs = [TensorRange.of(name, value) for name, _, value in call.read()]
        inputs += [_number_range(x) for x in call.numbers if not math.isfinite(x)]
        described = [TensorRange.of(_output(i, outputs), t) for i, t in enumerate(outputs)]
        return replace(
            event,
            inputs=tuple(inputs[:_DESCRIBED]),
            outputs=tuple(described[:_DESCRIBED]),
            precision=call.is_finite_in_float32(outputs),
            explanation=explain_call(call, outputs),
        )

    def _check_new(
        self, tensor: Tensor, origin: Origin = "constant", name: str = "a tensor"
    ) -> Any:
        """Checks an unknown tensor; returns its cause if it is not finite."""
        key = storage_of(tensor)
        if key not in self._known:
            self._known[key] = None
            if not all_finite(tensor):
                found = TensorRange.of(name, tensor)
                mask = origin in ("constant", "buffer") and not found.nan
                self._known[key] = Outside(origin, found, mask)
        return self._known[key]

    def _learn(self, tensor: Tensor, event: Event | None, call: Call) -> None:
        key = storage_of(tensor)
        fills = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        if event is not None or fills or key not in map(storage_of, (t for _, t in call.inputs)):
            self._known[key] = event

    # Traces back.

    def cause_of(self, tree: Any) -> tuple[Cause, ...]:
        """Returns the causes of the non-finite tensors in nested containers."""
        return tuple(self._cause(t, t) for t in floats(tree) if not all_finite(t))

    def _cause(self, tensor: Tensor, value: Tensor) -> Cause:
        known = self._known.get(storage_of(tensor))
        if known is not None:
            return known
        # The tensor was written without a torch operation, for example by a custom kernel.
        return Outside("constant", TensorRange.of("a tensor", value), False)

    @staticmethod
    def origin_of(causes: Iterable[Cause]) -> tuple[Cause | None, list[Event]]:
        """Returns the first cause behind these causes, and the events since, in order."""
        users: dict[int, list[Event]] = {}
        found: dict[int, Cause] = {}
        for cause, user in _ancestry(causes):
            found[id(cause)] = cause
            if user is not None:
                users.setdefault(id(cause), []).append(user)

        def first_used(cause: Cause) -> float:
            if isinstance(cause, Event):
                return cause.index
            return min((u.index for u in users.get(id(cause), ())), default=-1) - 0.5

        computed = [c for c in found.values() if isinstance(c, Event) and c.is_origin]
        existing = [c for c in found.values() if isinstance(c, Outside) and not c.placed]
        candidates = computed + existing or list(found.values())
        if not candidates:
            return None, []
        origin = min(candidates, key=first_used)
        after, todo = {}, [origin]
        while todo:
            for user in users.get(id(todo.pop()), ()):
                if user.index not in after:
                    after[user.index] = user
                    todo.append(user)
        return origin, [after[i] for i in sorted(after)]


def _ancestry(causes: Iterable[Cause]) -> Iterator[tuple[Cause, Event | None]]:
    """Yields every cause behind these causes, with the event that used it."""
    todo: list[tuple[Cause, Event | None]] = [(cause, None) for cause in causes]
    seen: set[int] = set()
    while todo:
        cause, user = todo.pop()
        yield cause, user
        if isinstance(cause, Event) and id(cause) not in seen:
            seen.add(id(cause))
            todo += [(c, cause) for c in cause.causes]


def _number_range(x: float) -> TensorRange:
    return TensorRange.of("a Python number", torch.tensor(x, dtype=torch.float64))


def _output(i: int, outputs: Sequence[Tensor]) -> str:
    return "output" if len(outputs) == 1 else f"output {i}"
