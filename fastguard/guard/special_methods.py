"""Gives a wrapper the special methods of the wrapped object, as used by `len(opt)` or `opt[0]`.

Python looks up special methods on the class and does not call `__getattr__` for them. If the
wrapped object (such as a container of several optimizers) defines special methods, the wrapper
therefore becomes an instance of a subclass that defines the same methods. No other special methods
are added, because training loops test for them, as with `callable(opt)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

_NAMES = (
    "__len__",
    "__iter__",
    "__next__",
    "__reversed__",
    "__contains__",
    "__getitem__",
    "__setitem__",
    "__delitem__",
    "__call__",
    "__enter__",
    "__exit__",
)


def adopt_special_methods(wrapper: Any, wrapped: Any) -> None:
    """Changes the class of `wrapper` so that it has the special methods of `wrapped`.

    Args:
        wrapper: Its class must have a method `__getstate__`. Methods that its class defines take
            precedence.
        wrapped: Must be the attribute `optimizer` of the wrapper.
    """
    kind = type(wrapper)
    names = tuple(n for n in _NAMES if _defines(type(wrapped), n) and not _defines(kind, n))
    if names:
        wrapper.__class__ = _subclass(kind, names)


def _defines(kind: type, name: str) -> bool:
    # `hasattr` would find `type.__call__`. A method set to None counts as missing, as in Python.
    return next((vars(k)[name] for k in kind.__mro__ if name in vars(k)), None) is not None


@cache
def _subclass(kind: type, names: tuple[str, ...]) -> type:
    """Returns a subclass with the same name, whose instances are copied and pickled as `kind`."""

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _blank, (kind,), self.__getstate__()

    methods = {name: _delegating(name) for name in names}
    described = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**methods, **described, "__reduce__": __reduce__})


def _delegating(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.optimizer, name)(*args, **kwargs)
        return self if result is self.optimizer else result

    method.__name__ = name
    return method


def _blank(kind: Any) -> Any:
    return kind.__new__(kind)
