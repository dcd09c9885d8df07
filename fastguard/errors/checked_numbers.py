"""Numbers among the arguments of a user: what is one, and what is taken for one by mistake.

`float()` makes 1.0 of True and of "1.0": a flag that slipped into the place of a limit, or a
setting that was read as text, would act silently. So both are refused wherever a number is asked
for.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastguard.errors.plain_text import shown

TEXT = (str, bytes, bytearray)
# Tuples, because torch.compile of torch 2.8 traces no union of types.
_BOOL_OR_TEXT = (bool, *TEXT)
_PLAIN = (int, float)
LARGEST_COUNT = 2**63 - 1
"""What int64 holds: counters on a device, and in files that others read."""


def number_of(name: str, value: Any, remedy: str = "use a number") -> float:
    """A number as a float; also one of numpy, a fraction, or a tensor with one element.

    Args:
        name: What the errors call it.
        value: The argument.
        remedy: What to do about what is no number.

    Raises:
        TypeError: It is a bool, text, or something else that is no number.
        ValueError: A finite number beyond the largest float.
    """
    if isinstance(value, float):  # by far the most frequent, and asked at each step
        return float(value)
    refuse_bool_and_text(name, value, remedy)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}={shown(value)} is not a number; {remedy}") from None
    if number in (math.inf, -math.inf) and value != number:  # a Decimal does not raise
        raise ValueError(
            f"{name}={shown(value)} is beyond the largest float; use float('inf') if that is what "
            "it means"
        )
    return number


def refuse_bool_and_text(name: str, value: Any, remedy: str = "use a number") -> None:
    """Raises a TypeError for what `float()` would make a number of; also while code is compiled."""
    if isinstance(value, _BOOL_OR_TEXT) or _holds_bool_or_text(value):
        kind = type(value).__name__
        raise TypeError(f"{name}={shown(value)} is not a number (type {kind}); {remedy}")


def _holds_bool_or_text(value: Any) -> bool:
    """Whether it is a tensor or an array of them."""
    dtype = None if isinstance(value, _PLAIN) else getattr(value, "dtype", None)
    return dtype is torch.bool or getattr(dtype, "kind", "") in ("b", "S", "U")


def finite_number_of(name: str, value: Any, remedy: str = "use a finite number") -> float:
    """As `number_of`, refusing NaN and infinities too.

    Raises:
        TypeError, ValueError: It is no number, or no finite one.
    """
    number = number_of(name, value, remedy)
    if not -math.inf < number < math.inf:  # NaN too; torch.compile traces no math.isfinite
        raise ValueError(f"{name}={value!r} must be a finite number; {remedy}")
    return number


def count_of(
    name: str, value: Any, low: int, high: int = LARGEST_COUNT, *, optional: bool = False
) -> int:
    """An integer from `low` to `high`.

    Args:
        name: What the errors call it.
        value: The argument.
        low: The least that makes sense.
        high: The most that has a place.
        optional: Whether the error is to say that None is another choice, which the caller has
            made already.

    Raises:
        ValueError: It is no such integer.
    """
    if is_integer(value) and low <= value <= high:
        return value
    at_most = f", at most {high}" if is_integer(value) and value > high else ""
    choice = "None or " if optional else ""
    raise ValueError(f"{name}={shown(value)} must be {choice}an integer >= {low}{at_most}")


def is_integer(value: object) -> bool:
    """Whether it is an integer; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)
