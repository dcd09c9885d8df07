"""JSON objects, one in each line: the metrics of detectron2, mmengine, W&B, MLflow and many loops,
and text logs that were wrapped in JSON by a container or a logger.

{"epoch": 3, "step": 15, "loss": NaN}
{"_step": 15, "train": {"loss": "NaN", "grad_norm": 3.1}}
{"key": "loss", "value": "NaN", "step": 15, "timestamp": 1700000000000}
{"log": "epoch 3 loss nan\n", "stream": "stdout"}

Lines that are records of fastguard are not read: their NaN were dealt with, and `fastguard report`
tells how.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fastguard.commands.run_files import is_record
from fastguard.commands.scan.columns import is_place, place_of
from fastguard.commands.scan.places import names_settings, where_in
from fastguard.commands.scan.reading import NOWHERE, Place, Reading
from fastguard.commands.scan.series import AllSeries
from fastguard.commands.scan.values import Value, nonfinite_values
from fastguard.commands.scan.words import is_bound, is_metric

NAME = "json"
RECORD = "fastguard"

DEPTH = 4
"""How deep objects in objects are read."""

MOST = 1000
"""Values of one object that are read."""

MOST_BAD = 64
"""Bad values of one object that are told."""

_SCALARS = frozenset({int, float, type(None), bool})
_LARGEST = sys.float_info.max

_WORDS = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}
_NAMED_BY = ("key", "metric", "name", "tag", "metric_name")
_TEXTS = ("log", "message", "msg", "text", "line", "event", "body", "content")

try:  # three times as fast as the standard library; what it refuses (a bare NaN), that one reads
    from orjson import loads as _fast
except ImportError:
    _fast = json.loads


class JsonLines:
    """Reads lines that are JSON objects.

    Args:
        series: Which names are judged as series.
    """

    def __init__(self, series: AllSeries) -> None:
        self._series = series
        self._plans: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...], bool]] = {}

    def read(self, line: bytes) -> Reading | None:
        """What a line says, or None if it is no JSON object."""
        found = parse(line)
        if found is None:
            return None
        lower = line.lower()
        if b"nan" in lower or b"inf" in lower or not _SCALARS.issuperset(map(type, found.values())):
            return self.read_object(found)
        return self._read_numbers(found)

    def read_entry(self, found: Mapping[str, Any]) -> Reading:
        """What an object of a document says."""
        values = found.values()
        if _SCALARS.issuperset(map(type, values)) and all(
            value is None or -_LARGEST <= value <= _LARGEST for value in values
        ):
            return self._read_numbers(found)
        return self.read_object(found)

    def _read_numbers(self, found: Mapping[str, Any]) -> Reading:
        """What an object says that holds finite numbers, and has been met before but for these."""
        names = tuple(found)
        plan = self._plans.get(names)
        if plan is None:
            if len(self._plans) >= MOST:
                self._plans.clear()
            reading = self.read_object(found)
            judged = tuple(filter(self._series.judges, names))
            places = tuple(filter(is_place, names))
            # A line of settings, or one whose value is named by another key, is read each time.
            if not is_record(found) and "value" not in found and not _is_settings(found):
                self._plans[names] = (judged, places, reading.measured)
            return reading
        judged, places, measured = plan
        place = place_of([(name, str(found[name])) for name in places])
        numbers = {}
        for name in judged:
            value = found[name]
            if value is not None and -_LARGEST <= value <= _LARGEST:  # 1e999 is read in full
                numbers[name] = float(value)
            elif value is not None:
                return self.read_object(found)
        return Reading(NAME, place, (), measured, None, numbers)

    def read_object(self, found: Mapping[str, Any]) -> Reading:
        """What an object says."""
        if is_record(found):
            return Reading(RECORD, NOWHERE, measured=False)
        bad: list[Value] = []
        numbers: dict[str, float] = {}
        places: list[tuple[str, str]] = []
        inner = NOWHERE
        measured = False
        long_name = _long_name(found)
        for name, value in _flat(found):
            name = long_name if long_name is not None and name == "value" else name
            if isinstance(value, str) and (word := value.strip().lower().lstrip("+-")) in _WORDS:
                value = -_WORDS[word] if value.strip().startswith("-") else _WORDS[word]
            if isinstance(value, str):
                texts, place = self._text(name, value)
                bad += texts
                inner = place if inner == NOWHERE else inner
                measured |= bool(texts)
                if is_place(name):
                    places.append((name, value))
                elif self._series.judges(name) and (number := _number(value)) is not None:
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
        place = NOWHERE if not bad and not numbers and _is_settings(found) else place_of(places)
        if place == NOWHERE:
            place = inner
        return Reading(NAME, place, tuple(bad[:MOST_BAD]), measured or bool(bad), None, numbers)

    def _text(self, name: str, value: str) -> tuple[list[Value], Place]:
        if len(value) < 3:
            return [], NOWHERE
        bad = list(nonfinite_values(value)[0])
        is_text = bool(bad) or name.rpartition("/")[2] in _TEXTS
        return bad, where_in(value).place(value) if is_text else NOWHERE


def parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line, or None."""
    for loads in (_fast, json.loads):
        try:
            found = loads(line)
        except (ValueError, RecursionError):
            continue
        return found if isinstance(found, dict) else None
    return None


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those of inner objects as `outer/inner`; booleans and None are left out."""
    left = MOST
    stack: list[tuple[str, Any, int]] = [("", found, 0)]
    while stack and left:
        prefix, value, depth = stack.pop()
        if isinstance(value, Mapping):
            if depth <= DEPTH:
                items = [(f"{prefix}/{key}" if prefix else str(key), v) for key, v in value.items()]
                stack += [(name, v, depth + 1) for name, v in reversed(items[:MOST])]
        elif isinstance(value, int) and (isinstance(value, bool) or abs(value) >> 1023):
            continue
        elif value is not None:
            left -= 1
            yield prefix, value


def _long_name(found: Mapping[str, Any]) -> str | None:
    """The name of the metric in an object that holds one value: key, value, step."""
    if "value" not in found:
        return None
    return next((str(found[key]) for key in _NAMED_BY if isinstance(found.get(key), str)), None)


def _kinds(values: list[Any]) -> list[str]:
    """Which of nan, inf and -inf a list holds, lists in it included."""
    kinds: dict[str, None] = {}
    stack: list[tuple[Any, int]] = [(values, 0)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, list) and depth <= DEPTH:
            stack += [(inner, depth + 1) for inner in reversed(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            kinds[str(value)] = None
    return list(kinds)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_settings(found: Mapping[str, Any]) -> bool:
    return names_settings(" ".join(f"{key}=" for key in list(found)[:200]))
