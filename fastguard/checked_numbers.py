"""Numbers among the arguments of a user: what is one, and what is taken for one by mistake.

`float()` makes 1.0 of True and of "1.0": a flag that slipped into the place of a limit, or a
setting that was read as text, would act silently. So both are refused wherever a number is asked
for.
"""

from __future__ import annotations

import math
from typing import Any

import torch

Text = str | bytes | bytearray
_SHOWN = 60  # characters of a value in an error


def number_of(name: str, value: Any, remedy: str = "use a number") -> float:
    """A number as a float; also one of numpy, a fraction, or a tensor with one element.

    Args:
        name: What the errors call it.
        value: The argument.
        remedy: What to do about what is no number.

    Raises:
        TypeError: It is a bool, text, or something else that is no number.
        ValueError: An integer beyond the largest float.
    """
    if isinstance(value, float):  # by far the most frequent, and asked at each step
        return float(value)
    refuse_bool_and_text(name, value, remedy)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name}={shown(value)} is beyond the largest float; use float('inf') if that is what "
            "it means"
        ) from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}={shown(value)} is not a number; {remedy}") from None


def refuse_bool_and_text(name: str, value: Any, remedy: str = "use a number") -> None:
    """Raises a TypeError for what `float()` would make a number of; also while code is compiled."""
    if isinstance(value, bool | Text) or _holds_bool_or_text(value):
        kind = type(value).__name__
        raise TypeError(f"{name}={shown(value)} is not a number (type {kind}); {remedy}")


def _holds_bool_or_text(value: Any) -> bool:
    """Whether it is a tensor or an array of them."""
    dtype = None if isinstance(value, int | float) else getattr(value, "dtype", None)
    return dtype is torch.bool or getattr(dtype, "kind", "") in ("b", "S", "U")


def finite_number_of(name: str, value: Any, remedy: str = "use a finite number") -> float:
    """As `number_of`, refusing NaN and infinities too.

    Raises:
        TypeError, ValueError: It is no number, or no finite one.
    """
    number = number_of(name, value, remedy)
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r} must be a finite number; {remedy}")
    return number


def is_integer(value: object) -> bool:
    """Whether it is an integer; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """The value in an error: its repr, in at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
