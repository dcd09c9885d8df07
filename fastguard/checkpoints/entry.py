"""`Entry`: the metadata of one checkpoint, and how to parse it from an untrusted file.

A manifest or a checkpoint header may come from an untrusted source, so every value is checked when
it is parsed. In particular, file names must have the form that a store assigns (`names.parse`), so
that they cannot be paths.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from fastguard.checkpoints import names
from fastguard.errors import Culprit, describe_culprits
from fastguard.errors.checked_numbers import count_of, is_integer
from fastguard.errors.plain_text import shown


@dataclass(frozen=True, slots=True)
class Entry:
    """The metadata of one checkpoint.

    Attributes:
        serial: Position in the order of saving; unique within a store.
        file: File name within the directory.
        step, epoch: Position in training.
        metric: The value that `best` compares; None if not given.
        tag: Arbitrary data from the caller.
        time: Time of saving, ISO 8601, UTC.
        incidents: Number of skipped steps and other incidents since the previous clean checkpoint.
        notes: The latest incidents, one line each.
        skipped_steps: Steps skipped in the whole run so far, not counting loss-scale adjustments;
            None unless a `GuardedOptimizer` was saved.
        n_tensors: Number of tensors checked.
        bad: `(name, nan, posinf, neginf)` for each tensor with NaN or Inf. A number that is NaN,
            such as a learning rate, counts as a tensor with one element.
        sha256: Checksum of the file.
        size: File size in bytes.
        verified: Whether the file was read back after writing and matched.
    """

    serial: int
    file: str
    step: int
    epoch: int | None = None
    metric: float | None = None
    tag: Any = None
    time: str = ""
    incidents: int = 0
    notes: tuple[str, ...] = ()
    skipped_steps: int | None = None
    n_tensors: int = 0
    bad: tuple[Culprit, ...] = ()
    sha256: str = ""
    size: int = 0
    verified: bool = False

    @property
    def finite(self) -> bool:
        """Whether every tensor is finite."""
        return not self.bad

    @property
    def clean(self) -> bool:
        """Whether every tensor is finite and the file is known to be as it was written."""
        return self.finite and self.verified

    @property
    def header(self) -> dict[str, Any]:
        """The copy of the entry stored inside the checkpoint, used to rebuild a lost manifest."""
        known = to_json(self)
        return {key: known[key] for key in _HEADER}

    def __str__(self) -> str:
        """Formats the entry as one line for a log."""
        parts = [f"step {self.step}"]
        if self.epoch is not None:
            parts.append(f"epoch {self.epoch}")
        if self.metric is not None:
            parts.append(f"metric {self.metric:g}")
        verdict = "clean" if self.clean else "damaged" if self.finite else "not finite"
        parts.append(verdict if self.finite else f"{verdict}: {describe_culprits(self.bad)}")
        return f"{self.file} ({', '.join(parts)})"


_HEADER = (
    "serial", "step", "epoch", "metric", "tag", "time", "incidents", "notes", "skipped_steps",
)  # fmt: skip


def to_json(entry: Entry) -> dict[str, Any]:
    """Converts an entry to the form that `from_json` reads."""
    values = json.loads(json.dumps(asdict(entry)))  # converts tuples to lists
    metric = entry.metric
    if metric is not None and not math.isfinite(metric):
        values["metric"] = str(metric)  # JSON has no NaN
    return values


def from_json(values: object) -> Entry:
    """Parses an entry; keys from other releases are ignored.

    Raises:
        ValueError: A value has the wrong type, or a name is not one that a store assigns.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a checkpoint entry is {shown(values)}, but must be a dict")
    read = {}
    for field in fields(Entry):
        if field.name in values:
            read[field.name] = checked(field.name, values[field.name], _READ[field.name])
        elif field.default is MISSING:
            raise ValueError(f"the entry of a checkpoint lacks {field.name}")
    entry = Entry(**read)
    name = names.parse(entry.file)
    if name is None:
        raise ValueError(f"file={shown(entry.file)} is not the name of a checkpoint")
    for key, number in name._asdict().items():
        if number != getattr(entry, key):
            raise ValueError(f"file={entry.file!r} does not match {key}={getattr(entry, key)}")
    return entry


def checked(key: str, value: object, read: Callable[[Any], Any]) -> Any:
    """Parses one value with `read`.

    Raises:
        ValueError: The value is invalid; the message contains the key and the value.
    """
    try:
        return read(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise ValueError(f"{key}={shown(value)} is not a valid value") from None


# Parsers for each kind of value; they raise TypeError or ValueError for anything else.


def text(value: object) -> str:
    """Parses a string."""
    if not isinstance(value, str):
        raise TypeError
    return value


def count(value: object) -> int:
    """Parses a non-negative integer that fits in int64."""
    return count_of("", value, 0)


def texts(value: object) -> tuple[str, ...]:
    """Parses a list of strings."""
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(map(text, value))


def plain_json(value: object) -> Any:
    """Copies a value that JSON can represent.

    Size and depth are limited, since a value from a pickle of a few bytes may contain itself, or
    the same list a billion times.

    Raises:
        TypeError, ValueError: The value is not JSON-serializable, or is too deep or too large.
    """
    left = 1_000_000  # values

    def copy(value: object, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 100:
            raise ValueError
        if isinstance(value, dict):
            return {text(k): copy(v, depth + 1) for k, v in dict.items(value)}
        if isinstance(value, list | tuple):
            return [copy(v, depth + 1) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        if isinstance(value, int) and value.bit_length() > 10_000:  # `str` refuses longer integers
            raise ValueError
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise TypeError

    return copy(value, 0)


def _metric(value: object) -> float:
    if not isinstance(value, float | str) and not is_integer(value):
        raise TypeError
    return float(value)  # type: ignore[arg-type]


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _sha256(value: object) -> str:
    if not re.fullmatch("[0-9a-f]{64}|", text(value)):
        raise ValueError
    return text(value)


def _culprits(value: object) -> tuple[Culprit, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple((text(name), count(nan), count(pos), count(neg)) for name, nan, pos, neg in value)


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


_READ: dict[str, Callable[[Any], Any]] = {
    "serial": count,
    "file": text,
    "step": count,
    "epoch": _optional(count),
    "metric": _optional(_metric),
    "tag": plain_json,
    "time": text,
    "incidents": count,
    "notes": texts,
    "skipped_steps": _optional(count),
    "n_tensors": count,
    "bad": _culprits,
    "sha256": _sha256,
    "size": count,
    "verified": _flag,
}
