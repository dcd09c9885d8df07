"""`TensorSettings`: replaces an optimizer's settings with 0-dim tensors while its update is traced.

A Python number would be a constant of the compiled update, so each new learning rate would cause a
recompilation. Torch accepts 0-dim tensors instead of numbers almost everywhere. This module handles
the exceptions: `alpha` and `value` of arithmetic operations, and the functions of `math`. A branch
on a setting (`if momentum != 0`) is decided by the current value and recorded; the compiled update
is valid as long as the branch has the same result.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "ne": operator.ne,
    "eq": operator.eq,
    "gt": operator.gt,
    "lt": operator.lt,
    "ge": operator.ge,
    "le": operator.le,
    "greater": operator.gt,
    "less": operator.lt,
    "not_equal": operator.ne,
    "greater_equal": operator.ge,
    "less_equal": operator.le,
}


IN_PLACE = re.compile(r"\w*[^_]_|__i(add|sub|mul|truediv|pow|div)__")
"""Names of functions that write into their first argument, as torch names them."""


class Branch(NamedTuple):
    """A comparison of a setting that the traced update depends on.

    Attributes:
        setting: The key of the setting.
        compare: A comparison of the module `operator`.
        other: The number that the setting was compared with.
        result: The result of the comparison.
    """

    setting: Any
    compare: Callable[[Any, Any], bool]
    other: float
    result: bool

    def holds(self, value: float) -> bool:
        """Whether the comparison has the same result for `value`. NaN compares as in Python."""
        return bool(self.compare(value, self.other)) == self.result


class WritesRealTensor(Exception):
    """The step writes into a real tensor, not a placeholder; tracing must not change it."""


class TensorSettings(TorchFunctionMode):
    """A mode in which torch accepts 0-dim tensors where it otherwise requires numbers.

    The mode also rejects writes into real tensors, which torch would carry out while tracing.

    Args:
        settings: `(tensor, key, value)` per setting: its tensor, its key in `branches`, and its
            current value.

    Attributes:
        branches: The comparisons that were decided by current values.
    """

    def __init__(self, settings: list[tuple[Tensor, Any, float]]) -> None:
        super().__init__()
        self._known = {id(t): (key, value) for t, key, value in settings}
        self.branches: list[Branch] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or IN_PLACE.fullmatch(name) or kwargs.get("out") is not None:
            written = [*args[:1], kwargs.get("out")]
            if any(isinstance(t, Tensor) and not is_fake(t) for t in tree_leaves(written)):
                raise WritesRealTensor(name)
        name = name.strip("_")
        if name in COMPARISONS and len(args) == 2:
            decided = self._decided(COMPARISONS[name], *args)
            if decided is not None:
                return decided
        if name == "bool" and len(args) == 1 and id(args[0]) in self._known:
            return self._decided(operator.ne, args[0], 0.0)
        if name == "item" and args[0].is_floating_point():
            return args[0]  # torch's own optimizers skip this call too while they are compiled
        done = _rewritten(func, args, kwargs)
        return func(*args, **kwargs) if done is NotImplemented else done

    def _decided(self, compare: Callable[[Any, Any], bool], x: Any, y: Any) -> bool | None:
        """Returns the result of comparing a setting with a number; None for other comparisons."""
        if id(x) not in self._known or isinstance(y, Tensor):
            return None
        key, value = self._known[id(x)]
        result = bool(compare(value, y))
        self.branches.append(Branch(key, compare, y, result))
        return result


@contextmanager
def python_of_tensors(kind: type) -> Iterator[None]:
    """Makes `math`, `min` and `max` accept 0-dim tensors in the modules that define a class.

    Optimizers call these for Python step counters. The names are replaced only in the modules of
    the class and its bases, and only within the context.
    """
    stand_ins = {"math": _TensorMath(), "min": _least, "max": _greatest}
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for names in _globals_of(kind):
            for name, stand_in in stand_ins.items():
                if name != "math" or names.get(name) is math:
                    replaced.append((names, name, names.get(name)))
                    names[name] = stand_in
        yield
    finally:
        for names, name, original in replaced:
            if original is None:
                del names[name]
            else:
                names[name] = original


def _globals_of(kind: type) -> list[dict[str, Any]]:
    """Returns the globals of the modules that define the methods of a class.

    These modules may differ from `__module__`.
    """
    methods = [
        inspect.unwrap(m) for base in kind.__mro__ for m in vars(base).values() if callable(m)
    ]
    found = (getattr(method, "__globals__", None) for method in methods)
    return list({id(names): names for names in found if names is not None}.values())


class _TensorMath:
    """The module `math`, whose functions also accept tensors if torch has the function."""

    def __getattr__(self, name: str) -> Any:
        original = getattr(math, name)

        def function(*args: Any) -> Any:
            if not any(isinstance(x, Tensor) for x in args):
                return original(*args)
            return getattr(torch, name)(*args)

        return function if callable(original) and hasattr(torch, name) else original


def _least(*values: Any, **kwargs: Any) -> Any:
    return _extreme(min, torch.minimum, values, kwargs)


def _greatest(*values: Any, **kwargs: Any) -> Any:
    return _extreme(max, torch.maximum, values, kwargs)


def _extreme(
    of_numbers: Callable[..., Any],
    of_tensors: Callable[[Tensor, Tensor], Tensor],
    values: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    tensor = next((v for v in values if isinstance(v, Tensor)), None)
    if tensor is None or len(values) < 2:
        return of_numbers(*values, **kwargs)
    result, *others = (v if isinstance(v, Tensor) else tensor.new_full((), v) for v in values)
    for other in others:
        result = of_tensors(result, other)
    return result


_CALL = re.compile(r"(_foreach_)?(add|sub|addcdiv|addcmul|lerp)(_?)")
_NUMBER = {"add": "alpha", "sub": "alpha", "addcdiv": "value", "addcmul": "value"}
_TERM: Mapping[str, Callable[..., Tensor]] = {
    "add": lambda number, other: other * number,
    "sub": lambda number, other: other * -number,
    "addcdiv": lambda number, a, b: a / b * number,
    "addcmul": lambda number, a, b: a * b * number,
}


def _rewritten(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the result of a call with a tensor as `alpha`, `value` or `weight`.

    Returns NotImplemented for all other calls.
    """
    form = _CALL.fullmatch(getattr(func, "__name__", ""))
    if form is None:
        return NotImplemented
    each, name, in_place = form.groups()
    operands, number = list(args), kwargs.get(_NUMBER.get(name, "weight"))
    if number is None and len(args) == (4 if name.startswith("addc") else 3):
        number = operands.pop()
    if not isinstance(number, Tensor) or number.numel() != 1:
        return NotImplemented
    operands += [v for v in kwargs.values() if v is not number]
    number = number.reshape(())
    rows = zip(*operands, strict=True) if each else [operands]
    done = [_single(name, bool(in_place), number, *row) for row in rows]
    return done if each else done[0]


def _single(name: str, in_place: bool, number: Tensor, x: Tensor, *others: Tensor) -> Tensor:
    if name == "lerp":  # the weight must have the dtype of x
        end, weight = others[0], number.to(x.dtype)
        return x.lerp_(end, weight) if in_place else x.lerp(end, weight)
    term = _TERM[name](number, *others)
    return x.add_(term) if in_place else x + term
