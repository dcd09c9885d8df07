"""`Entry`: what a store knows of one checkpoint, and how it is read from a file that may lie.

A manifest, and the header of a checkpoint, may come from anywhere. So every value is checked where
it is read: a name is one that a store gives (`names.parse`), never a path; a number is a number.
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
    """One checkpoint.

    Attributes:
        serial: Its place in the order of saving; never used twice in a store.
        file: Its name in the directory.
        step, epoch: Where training stood.
        metric: What `best` compares; None if not given.
        tag: Whatever the caller gave.
        time: When it was saved, ISO 8601, UTC.
        incidents: Skipped steps and the like since the last clean checkpoint before this one.
        notes: The last of them, one line each.
        skipped_steps: Of the whole run so far, if a `GuardedOptimizer` was saved; without those
            that only lowered a loss scale.
        n_tensors: How many tensors were looked at.
        bad: `(name, nan, posinf, neginf)` of each that holds NaN or Inf; numbers that are NaN, such
            as a learning rate, count as tensors of one element.
        sha256: Of the file.
        size: Bytes.
        verified: Read back whole after it was written, and found as written.
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
        """Whether it is finite and known to be on disk as it was written."""
        return self.finite and self.verified

    @property
    def header(self) -> dict[str, Any]:
        """What the checkpoint itself repeats, so that the manifest can be built again."""
        known = to_json(self)
        return {key: known[key] for key in _HEADER}

    def __str__(self) -> str:
        """One line for a log."""
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
    """The entry as `from_json` reads it."""
    values = json.loads(json.dumps(asdict(entry)))  # tuples are lists there
    metric = entry.metric
    if metric is not None and not math.isfinite(metric):
        values["metric"] = str(metric)  # JSON has no NaN
    return values


def from_json(values: object) -> Entry:
    """The entry that was written so; keys of other releases are ignored.

    Raises:
        ValueError: It is no entry: a value of another type, or a name that no store gives.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{shown(values)} in place of what is known of a checkpoint")
    read = {}
    for field in fields(Entry):
        if field.name in values:
            read[field.name] = checked(field.name, values[field.name], _READ[field.name])
        elif field.default is MISSING:
            raise ValueError(f"{field.name} is missing")
    entry = Entry(**read)
    name = names.parse(entry.file)
    if name is None:
        raise ValueError(f"file={shown(entry.file)}, which is no name of a checkpoint")
    if name.serial != entry.serial:
        raise ValueError(f"file={entry.file!r} has another number than serial={entry.serial}")
    return entry


def checked(key: str, value: object, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of a value out of a file.

    Raises:
        ValueError: It is nothing of that kind; the error has the key and the value.
    """
    try:
        return read(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise ValueError(f"{key}={shown(value)}") from None


# How each kind of value is read; what is none raises TypeError or ValueError.


def text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def count(value: object) -> int:
    """An integer that fits an int64, and is not negative."""
    return count_of("", value, 0)


def texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(map(text, value))


def plain_json(value: object) -> Any:
    """A copy of a value that JSON can hold.

    The one that stands in a pickle may hold itself, or the same list a billion times in a few
    bytes, so its size is bounded as well as its depth.

    Raises:
        TypeError, ValueError: JSON cannot hold it, or it is too deep or too large.
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
        if isinstance(value, int) and value.bit_length() > 10_000:  # str() refuses longer ones
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
