"""Checks numbers in a user's arguments.

`float()` converts True, "1.0" and byte buffers with this text to 1.0, so a misplaced flag or a
setting read as text would be accepted silently. Therefore bools and text raise an error wherever a
number is expected.
"""

from __future__ import annotations

import math
from collections import UserString
from typing import Any

import torch

from fastguard.errors.plain_text import shown

TEXT = (str, bytes, bytearray, memoryview, UserString)
# The types are tuples, because torch.compile of torch 2.8 cannot trace unions of types.
_BOOL_OR_TEXT = (bool, *TEXT)
_PLAIN = (int, float)
LARGEST_COUNT = 2**63 - 1
"""The largest int64, the limit of counters on a device and of integers in many file formats."""


def number_of(name: str, value: Any, remedy: str = "use a number") -> float:
    """Converts a number to float; accepts numpy numbers, fractions and tensors with one element.

    Args:
        name: The name of the argument in error messages.
        value: The argument.
        remedy: Advice for values that are not numbers.

    Raises:
        TypeError: The value is a bool, text, or something else that is not a number.
        ValueError: A finite number is beyond the largest float.
    """
    if isinstance(value, float):  # checked first, since it is the usual case in each step
        return float(value)
    refuse_bool_and_text(name, value, remedy)
    try:
        if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
            raise TypeError  # `float` would parse the bytes of an `array` or another buffer
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}={shown(value)} is not a number; {remedy}") from None
    # a Decimal becomes infinite without an error
    if number in (math.inf, -math.inf) and value != number:
        raise ValueError(
            f"{name}={shown(value)} is beyond the largest float; use float('inf') if it is infinite"
        )
    return number


def refuse_bool_and_text(name: str, value: Any, remedy: str = "use a number") -> None:
    """Raises a TypeError for bools and text, which `float()` accepts; also in compiled code."""
    if isinstance(value, _BOOL_OR_TEXT) or _holds_bool_or_text(value):
        kind = type(value).__name__
        raise TypeError(f"{name}={shown(value)} is not a number (type {kind}); {remedy}")


def _holds_bool_or_text(value: Any) -> bool:
    """Whether a value is a tensor or an array of bools, text, or other values that are not real.

    In compiled code, arrays are not checked.
    """
    if torch.compiler.is_compiling() and not isinstance(value, torch.Tensor):
        return False  # torch.compile cannot trace the dtype of numpy numbers
    dtype = None if isinstance(value, _PLAIN) else getattr(value, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype is torch.bool or dtype.is_complex
    return getattr(dtype, "kind", "") in ("b", "c", "O", "S", "U", "V")


def finite_number_of(name: str, value: Any, remedy: str = "use a finite number") -> float:
    """Converts a finite number to float, as `number_of` does.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is NaN or infinite.
    """
    number = number_of(name, value, remedy)
    # this form also rejects NaN; torch.compile cannot trace math.isfinite
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number; {remedy}")
    return number


def count_of(
    name: str, value: Any, low: int, high: int = LARGEST_COUNT, *, optional: bool = False
) -> int:
    """Checks that a value is an integer from `low` to `high`, and returns it.

    Args:
        name: The name of the argument in error messages.
        value: The argument.
        low: The smallest valid value.
        high: The largest valid value.
        optional: Whether the error message also offers None, which the caller must accept itself.

    Raises:
        ValueError: The value is not such an integer.
    """
    if is_integer(value) and low <= value <= high:
        return value
    at_most = f", at most {high}" if is_integer(value) and value > high else ""
    choice = "None or " if optional else ""
    raise ValueError(f"{name}={shown(value)} must be {choice}an integer >= {low}{at_most}")


def is_integer(value: object) -> bool:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
