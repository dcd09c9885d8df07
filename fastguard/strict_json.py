"""Values as JSON that every parser reads.

JSON (RFC 8259) has no NaN and no infinity; Python writes them anyway, and jq, JavaScript and most
databases then refuse the line. Here they become the strings `"NaN"`, `"Infinity"`, `"-Infinity"`,
as in the JSON mapping of Protocol Buffers: nothing is lost, and `float()` reads them back. null
would be shorter, but could not tell a NaN loss from one that was never given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def strict(value: Any) -> Any:
    """The value as dicts with string keys, lists, strings, finite numbers, bools and None.

    What JSON cannot hold otherwise becomes its `str`.

    Example:
        >>> strict({"norm": float("nan"), "batch": (3, 1.5)})
        {'norm': 'NaN', 'batch': [3, 1.5]}
    """
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, int)):  # a union would be made each time
        return value
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return str(value)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`json.dumps` of `strict(value)`."""
    if indent is None:
        return encode(strict(value))
    return json.dumps(strict(value), indent=indent, allow_nan=False, ensure_ascii=False)


encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
"""`dumps` of a value that is strict already; `json.dumps` makes an encoder for each call."""
