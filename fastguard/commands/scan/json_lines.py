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
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from fastguard.commands.scan.columns import KINDS, is_place, kind_of, place_of, whole
from fastguard.commands.scan.places import names_settings, where_in
from fastguard.commands.scan.reading import NOWHERE, Place, Reading
from fastguard.commands.scan.rows import Rows
from fastguard.commands.scan.series import AllSeries
from fastguard.commands.scan.values import Value, nonfinite_values
from fastguard.commands.scan.words import is_bound, is_metric
from fastguard.records.read_json_lines import are_records

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


class _Plan(NamedTuple):
    """How objects with the same names and types are read.

    Attributes:
        judged: Names of series.
        places: The names of its epoch, batch and step, or None.
        measured: Whether they tell of losses or norms.
    """

    judged: tuple[str, ...]
    places: tuple[str | None, ...]
    measured: bool


class JsonLines:
    """Reads lines that are JSON objects.

    Args:
        series: Which names are judged as series.
    """

    WAITING = 256
    """Objects that are read together."""

    def __init__(self, series: AllSeries) -> None:
        self._series = series
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._plan: _Plan | None = None
        self.waiting: list[tuple[int, Mapping[str, Any], _Plan]] = []

    def add(self, number: int, found: Mapping[str, Any]) -> bool:
        """Takes an object of finite numbers, if one like it has been read; else returns False."""
        plan = self._plans.get((*found, *map(type, found.values())))
        if plan is None:
            return False
        known = self._plan
        if plan is not known and self.waiting and known is not None:
            said, before = ([bool(name) for name in p.places] for p in (plan, known))
            if said != before and not (said[0] and before[0]):
                return False
        self._plan = plan
        self.waiting.append((number, found, plan))
        return True

    def rows(self) -> Rows | None:
        """What the objects that wait say; None: they must be read one by one."""
        waiting = self.waiting
        lines = [number for number, _, _ in waiting]
        columns: dict[str, tuple[list[int], list[float]]] = {}
        try:
            for at, (_, found, plan) in enumerate(waiting):
                for name in plan.judged:
                    column = columns.get(name)
                    if column is None:
                        column = columns[name] = ([], [])
                    column[0].append(at)
                    column[1].append(float(found[name]))
                epoch, *others = plan.places
                if epoch is not None and not _is_epoch(found[epoch]):
                    return None
                for other in others:
                    if other is not None and not 0 <= found[other] < 10**15:
                        return None
            if not all(all(map(math.isfinite, values)) for _, values in columns.values()):
                return None
        except OverflowError:
            return None

        def place(at: int) -> Place:
            _, found, (_, (epoch, batch, step), _) = waiting[at]
            return Place(
                None if epoch is None else whole(found[epoch]),
                None,
                None if batch is None else found[batch],
                None,
                None if step is None else found[step],
            )

        return Rows(lines, place, columns, any(plan.measured for _, _, plan in waiting))

    def read(self, found: Mapping[str, Any]) -> Reading:
        """What an object says."""
        reading = self._read(found)
        names, types = tuple(found), tuple(map(type, found.values()))
        # A line of settings, or one whose value is named by another key, is read each time.
        if (
            _SCALARS.issuperset(types)
            and not reading.bad
            and not (reading.dialect == RECORD or "value" in found or _is_settings(found))
        ):
            kinds = [
                kind_of(name) if kind in (int, float) else None
                for name, kind in zip(names, types, strict=True)
            ]
            places = tuple(names[kinds.index(k)] if k in kinds else None for k in KINDS)
            judged = (
                name
                for name, kind in zip(names, types, strict=True)
                if kind in (int, float) and self._series.judges(name) and not is_place(name)
            )
            # Only an epoch has a fraction.
            if all(name is None or type(found[name]) is int for name in places[1:]):
                if len(self._plans) >= MOST:
                    self._plans.clear()
                self._plans[(*names, *types)] = _Plan(tuple(judged), places, reading.measured)
        return reading

    def _read(self, found: Mapping[str, Any]) -> Reading:
        if are_records([found]):
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


def parse(line: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The JSON object in a line, or None, and whether all numbers in it are finite."""
    if b"NaN" not in line and b"Infinity" not in line:
        try:
            found = _fast(line)
        except (ValueError, RecursionError):
            pass
        else:
            return (found if isinstance(found, dict) else None), _fast is not json.loads
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None, False
    return (found, is_finite(found.values())) if isinstance(found, dict) else (None, False)


def is_finite(values: Collection[Any]) -> bool:
    """Whether all are numbers and finite, or are missing."""
    try:
        return all(map(math.isfinite, values))
    except (TypeError, OverflowError):
        return _SCALARS.issuperset(map(type, values)) and all(
            value is None or -_LARGEST <= value <= _LARGEST for value in values
        )


def _is_epoch(value: float) -> bool:
    """Whether it is written as digits, with a point or without."""
    return 1e-4 <= value < 1e15 or value == 0


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
