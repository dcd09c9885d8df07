"""What gradients are: numbers in memory, placeholders, or tensors around tensors.

The fast roads read memory: numpy on a CPU, addresses on a GPU. That is right for plain tensors
alone. Under `FakeTensorMode` (memory estimation), `make_fx` and AOT tracing a tensor is a
placeholder; under `torch.func` and in wrapper subclasses it is a layer around another one.

What caches keep outlives the call that made it, and so is made where nobody watches: see `lasting`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor

_PLAIN_DISPATCH = Tensor.__torch_dispatch__  # type: ignore[attr-defined]  # of all classes that do not look at what is done
_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # fake, proxy, functional
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]
_jit_traces = torch._C._is_tracing


PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""Classes known to be plain without a look at them."""


class Kind(Enum):
    """How tensors can be read.

    `PLAIN`: their memory is there. `TRACED`: they hold no numbers yet, but what is done to them is
    recorded: an opaque op for each stage. `WRAPPED`: operations of torch reach the tensors inside,
    and nothing else does.
    """

    PLAIN = 0
    TRACED = 1
    WRAPPED = 2


PLAIN, TRACED, WRAPPED = Kind  # the names of an enumeration take 0.05 µs each time


def watched() -> bool:
    """Whether a plain tensor may stand for something else now: a transform or a tracer is at work.

    Modes that only look on, such as a counter of operations, do not count. 0.3 µs.
    """
    if _transform() is not None or _jit_traces():
        return True
    return _modes() > 0 and _tracing_mode()


def kind_of(types: Iterable[type]) -> Kind:
    """The kind of tensors of these types, here and now."""
    layers = [t for t in types if wraps(t)]
    if not layers and not watched():
        return PLAIN
    placeholders = _placeholders()
    if all(issubclass(t, placeholders) for t in layers) and not (_transform() or _jit_traces()):
        return TRACED
    return WRAPPED


def wraps(kind: type) -> bool:
    """Whether a class of tensors decides itself what operations do."""
    return getattr(kind, "__torch_dispatch__", _PLAIN_DISPATCH) is not _PLAIN_DISPATCH


LACKING = (NotImplementedError, RecursionError, TypeError)
"""What classes of tensors raise at an operation that they do not know."""


def refuse_wrapped(tensors: Iterable[Tensor], error: Exception) -> None:
    """Raises a TypeError that names the classes among tensors that decide themselves what
    operations do: one of them lacks an operation. Without such a class, returns.
    """
    kinds = sorted({type(t).__name__ for t in tensors if wraps(type(t))})
    if kinds:
        raise TypeError(
            f"gradients of type {', '.join(kinds)} lack an operation that fastguard needs "
            f"({type(error).__name__}); pass plain tensors, such as to_tensor(0.0) of a "
            "MaskedTensor, or leave these parameters out"
        ) from error


def has_numbers(t: Tensor) -> bool:
    """Whether the host can read a tensor: placeholders and meta tensors have nothing to read."""
    kind = type(t)
    if kind in PLAIN_TYPES and not watched():
        return not t.is_meta
    return kind_of((kind,)) is not TRACED and not t.is_meta


@contextmanager
def lasting() -> Iterator[None]:
    """Around the making of what is kept for later calls: plain tensors, whatever mode is active."""
    guard = torch._C._DisableTorchDispatch()
    try:
        with torch.inference_mode(False):
            yield
    finally:
        del guard


def _tracing_mode() -> bool:
    return any(torch._C._get_dispatch_mode(key) is not None for key in _MODES)


def _placeholders() -> tuple[type, ...]:
    """The classes of placeholders. Imports nothing: what was not imported has no instances."""
    names = (
        ("torch._subclasses.fake_tensor", "FakeTensor"),
        ("torch._subclasses.functional_tensor", "FunctionalTensor"),
    )
    return tuple(getattr(sys.modules[m], name) for m, name in names if m in sys.modules)
