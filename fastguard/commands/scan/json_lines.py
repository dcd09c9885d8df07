"""Parses logs with one JSON object per line.

Detectron2, mmengine, W&B, MLflow and many training loops write such logs. Containers and loggers
wrap the lines of text logs in JSON.

{"epoch": 3, "step": 15, "loss": NaN}
{"_step": 15, "train": {"loss": "NaN", "grad_norm": 3.1}}
{"key": "loss", "value": "NaN", "step": 15, "timestamp": 1700000000000}
{"log": "epoch 3 loss nan\n", "stream": "stdout"}

Records of fastguard are not judged here, since the guard handled their NaN; see `fastguard report`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, filterfalse, islice, takewhile
from typing import Any

from fastguard.commands.scan.budget import Budget, units_of
from fastguard.commands.scan.columns import NAMED_BY, is_place, place_of
from fastguard.commands.scan.places import names_settings, where_in
from fastguard.commands.scan.reading import NOWHERE, Place, Reading
from fastguard.commands.scan.series import AllSeries
from fastguard.commands.scan.spellings import may_have
from fastguard.commands.scan.values import Value, nonfinite_values
from fastguard.commands.scan.vocabulary import is_bound, is_metric
from fastguard.records.read_json_lines import are_records
from fastguard.records.run_header import is_header

NAME = "json"
RECORD = "fastguard"

DEPTH = 4
"""Maximum depth of nested objects."""

MAX_VALUES = 1000
"""Maximum number of values read per object."""

LONG = 4096
"""Longer strings are split into parts of this many characters, at a space or line feed."""

MAX_BAD = 64
"""Maximum number of bad values reported per object."""

_WORDS = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}
TEXTS = ("log", "message", "msg", "text", "line", "event", "body", "content")
"""Keys with lines of text, which may name a place."""

try:  # three times as fast as the standard library, which only a bare NaN needs
    from orjson import loads as _fast
except ImportError:
    _fast = json.loads


class JsonLines:
    """Parses lines that are JSON objects.

    Args:
        series: Decides which names are judged as series.
        budget: The budget for long strings.
    """

    def __init__(self, series: AllSeries, budget: Budget) -> None:
        self._series = series
        self._budget = budget

    def read(self, found: Mapping[str, Any]) -> Reading:
        """Parses an object."""
        if are_records([found]) or is_header(found):
            return Reading(RECORD, NOWHERE, measured=False)
        bad: list[Value] = []
        numbers: dict[str, float] = {}
        places: list[tuple[str, str]] = []
        inner = NOWHERE
        measured = False
        unread = ""
        label = long_name(found)
        for name, value in _flat(found):
            name = label if label is not None and name == "value" else name
            if isinstance(value, str) and (word := word_of(value)) is not None:
                value = float(word)
            if isinstance(value, str):
                texts, place, rest = self._text(name, value)
                bad += texts
                unread = unread or rest
                inner = place if inner == NOWHERE else inner
                measured |= bool(texts)
                if is_place(name):
                    places.append((name, value))
                elif self._series.judges(name) and (number := number_of(value)) is not None:
                    numbers[name] = number
                continue
            if isinstance(value, list):
                bad += [Value(name, kind) for kind in _kinds(value) if not is_bound(name, kind)]
                continue
            if is_place(name):
                places.append((name, str(value)))
            elif isinstance(value, float) and not math.isfinite(value):
                kind = str(value)
                if not is_bound(name, kind):
                    bad.append(Value(name, kind))
            elif self._series.judges(name):
                numbers[name] = float(value)
            measured = measured or is_metric(name)
        place = NOWHERE if not bad and not numbers and is_settings(found) else place_of(places)
        if place == NOWHERE:
            place = inner
        measured |= bool(bad)
        return Reading(NAME, place, tuple(bad[:MAX_BAD]), measured, None, numbers, unread)

    def _text(self, name: str, value: str) -> tuple[list[Value], Place, str]:
        """The NaN and Inf in a string, the place that it names, and the part that was not read."""
        if len(value) < 3:
            return [], NOWHERE, ""
        bad, unread = self._long_text(value) if len(value) > LONG else (_bad(value), "")
        is_text = bool(bad) or name.rpartition("/")[2] in TEXTS
        return bad, where_in(value).place(value) if is_text else NOWHERE, unread

    def _long_text(self, text: str) -> tuple[list[Value], str]:
        """The distinct NaN and Inf in a long string, and the part for which no budget was left."""
        bad: dict[Value, None] = {}
        begin = 0
        while begin < len(text):
            end = begin + LONG
            if end < len(text):
                end = max(text.rfind(" ", begin, end), text.rfind("\n", begin, end)) + 1 or end
            part = text[begin:end]
            if may_have(part.lower()):
                if self._budget.spent:
                    return list(bad), text[begin:]
                self._budget.spend(units_of(part.encode(errors="replace")))
                bad.update(dict.fromkeys(_bad(part)))
            begin = end
        return list(bad), ""


def _bad(text: str) -> list[Value]:
    return list(nonfinite_values(text)[0])


def parse_finite(text: bytes) -> Any:
    """The JSON value of a text without NaN and Infinity, or None."""
    if b"NaN" in text or b"Infinity" in text:
        return None
    try:
        return _fast(text)
    except (ValueError, RecursionError):
        return None


def parse(line: bytes) -> Any:
    """The JSON value of a text, or None."""
    if (value := parse_finite(line)) is not None:
        return value
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def parse_lines(lines: Sequence[bytes]) -> list[Any]:
    """The leading lines that are objects, parsed; usually in a single call."""
    found = parse(b"[" + b",".join(lines) + b"]")
    if isinstance(found, list) and len(found) == len(lines) and {*map(type, found)} == {dict}:
        return found
    return list(takewhile(lambda value: isinstance(value, dict), map(parse, lines)))


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, with nested objects as `outer/inner`; skips booleans and None.

    Objects in a list share the name of the list, unless each object names a single value.
    """
    left = MAX_VALUES
    stack: list[tuple[str, Any, int]] = [("", found, 0)]
    while stack and left:
        prefix, value, depth = stack.pop()
        if isinstance(value, Mapping):
            if depth <= DEPTH:
                items = [
                    (f"{prefix}/{key}" if prefix else str(key), inner, depth + 1)
                    for key, inner in islice(value.items(), MAX_VALUES)
                ]
                stack += reversed(items)
        elif isinstance(value, int) and (isinstance(value, bool) or abs(value) >> 1023):
            continue
        elif isinstance(value, list) and dict in {*map(type, value)}:
            inner = [v for v in islice(value, MAX_VALUES) if isinstance(v, Mapping)]
            named = [(v, long_name(v)) for v in inner]
            stack += [
                (prefix, v, depth + 1) if name is None else (f"{prefix}/{name}", v["value"], depth)
                for v, name in reversed(named)
                if depth <= DEPTH
            ]
            yield prefix, [v for v in value if not isinstance(v, Mapping)]
        elif value is not None:
            left -= 1
            yield prefix, value


def long_name(found: Mapping[str, Any]) -> str | None:
    """The name of the metric in an object with a single value: key, value, step."""
    if "value" not in found:
        return None
    return next((str(found[key]) for key in NAMED_BY if isinstance(found.get(key), str)), None)


def _kinds(values: list[Any]) -> list[str]:
    """Which of nan, inf and -inf a list holds, including nested lists and objects."""
    for _ in range(DEPTH):
        if not {list, dict} & {*map(type, values)}:
            break
        values = list(chain.from_iterable(map(_items, values)))
    floats = [value for value in values if type(value) is float]
    bad = list(filterfalse(math.isfinite, floats))
    first = {kind: bad.index(kind) for kind in (math.inf, -math.inf) if kind in bad}
    if (nan := next(filter(math.isnan, bad), None)) is not None:
        first[nan] = bad.index(nan)
    return [str(kind) for kind in sorted(first, key=first.__getitem__)]


def _items(value: Any) -> Iterable[Any]:
    return value if type(value) is list else value.values() if type(value) is dict else (value,)


def number_of(text: str) -> float | None:
    """The finite number in a text, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def is_settings(names: Iterable[str]) -> bool:
    """Whether objects with these keys hold settings of a run."""
    return names_settings(" ".join(f"{name}=" for name in islice(names, 200)))


def word_of(text: str) -> str | None:
    """`"nan"`, `"inf"` or `"-inf"` if the text is exactly that, else None."""
    text = text.strip()
    word = _WORDS.get(text.lower().lstrip("+-"))
    return None if word is None else str(-word if text.startswith("-") else word)
