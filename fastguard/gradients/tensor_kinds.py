"""Classifies tensors as plain tensors, placeholders, or wrappers of other tensors.

The fast paths read memory directly, through numpy on a CPU and by address on a GPU. Such reads are
correct only for plain tensors. Under `FakeTensorMode` (memory estimation), `make_fx` and AOT
tracing, a tensor is a placeholder without values. Under `torch.func`, and in wrapper subclasses, a
tensor wraps another one.

Tensors that are cached for later calls must be plain, so they are created in the context `lasting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor

from fastguard.ranks.dtensors import imported_class

_PLAIN_DISPATCH = Tensor.__torch_dispatch__  # type: ignore[attr-defined]  # the default
_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # fake, proxy, functional
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]
_jit_traces = torch._C._is_tracing


PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""Classes that are always plain."""


class Kind(Enum):
    """How tensors can be read.

    Attributes:
        PLAIN: From memory.
        TRACED: Not at all. Operations on them are recorded; each stage is recorded as one op.
        WRAPPED: Only by torch's operations, which act on the inner tensors.
    """

    PLAIN = 0
    TRACED = 1
    WRAPPED = 2


PLAIN, TRACED, WRAPPED = Kind  # accessing enum members takes 0.05 µs each time


def watched() -> bool:
    """Whether a transform or a tracer is active, so that plain tensors may stand for others.

    Modes that only observe, such as an operation counter, do not count. Takes 0.3 µs.
    """
    if _transform() is not None or _jit_traces():
        return True
    return _modes() > 0 and _tracing_mode()


def kind_of(types: Iterable[type]) -> Kind:
    """Returns the kind of a list of tensors with these types in the current context."""
    layers = [t for t in types if wraps(t)]
    if not layers and not watched():
        return PLAIN
    placeholders = _placeholders()
    if all(issubclass(t, placeholders) for t in layers) and not (_transform() or _jit_traces()):
        return TRACED
    return WRAPPED


def wraps(kind: type) -> bool:
    """Whether a tensor class redefines operations."""
    return getattr(kind, "__torch_dispatch__", _PLAIN_DISPATCH) is not _PLAIN_DISPATCH


def is_wrapped(t: Tensor) -> bool:
    """Whether a tensor wraps others, and can only be read by torch's operations."""
    kind = type(t)
    return kind not in PLAIN_TYPES and wraps(kind) and kind_of((kind,)) is WRAPPED


UNSUPPORTED_ERRORS = (NotImplementedError, RecursionError, TypeError)
"""Errors that tensor classes raise for unsupported operations."""


def refuse_wrapped(tensors: Iterable[Tensor], error: Exception) -> None:
    """Raises a TypeError that names the tensor classes that redefine operations.

    Call this function after an error in `UNSUPPORTED_ERRORS`. It returns normally if there is no
    such class.
    """
    kinds = sorted({type(t).__name__ for t in tensors if wraps(type(t))})
    if kinds:
        raise TypeError(
            f"gradients of type {', '.join(kinds)} lack an operation that fastguard needs "
            f"({type(error).__name__}); pass plain tensors, such as to_tensor(0.0) of a "
            "MaskedTensor, or leave these parameters out"
        ) from error


def has_numbers(t: Tensor) -> bool:
    """Whether a tensor has values; placeholders and meta tensors have none."""
    kind = type(t)
    if kind in PLAIN_TYPES and not watched():
        return not t.is_meta
    return kind_of((kind,)) is not TRACED and not t.is_meta


@contextmanager
def lasting() -> Iterator[None]:
    """Context in which new tensors are plain, so that they can be cached; disables all modes."""
    guard = torch._C._DisableTorchDispatch()
    try:
        with torch.inference_mode(False):
            yield
    finally:
        del guard


def _tracing_mode() -> bool:
    return any(torch._C._get_dispatch_mode(key) is not None for key in _MODES)


def _placeholders() -> tuple[type, ...]:
    """Returns the placeholder classes that are imported; all others have no instances."""
    names = (
        ("torch._subclasses.fake_tensor", "FakeTensor"),
        ("torch._subclasses.functional_tensor", "FunctionalTensor"),
    )
    return tuple(filter(None, (imported_class(module, name) for module, name in names)))
