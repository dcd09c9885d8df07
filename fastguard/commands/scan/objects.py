"""Reads consecutive JSON objects as columns.

Most objects have the same keys as the previous one. Each key is therefore interpreted once for all
of them, and the loops over the values run in C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from fastguard.commands.scan import json_lines
from fastguard.commands.scan.columns import KINDS, is_place, kind_of, whole
from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.rows import Column, Rows
from fastguard.commands.scan.series import AllSeries
from fastguard.commands.scan.spellings import may_have
from fastguard.commands.scan.values import Value
from fastguard.commands.scan.vocabulary import is_bound, is_metric
from fastguard.records.read_json_lines import are_records
from fastguard.records.run_header import is_header

MIN_OBJECTS = 4
"""Minimum number of objects with the same keys that are read together."""

_NUMBERS = frozenset({int, float})
_EMPTY = frozenset({bool, type(None)})
_IN_LISTS = _NUMBERS | _EMPTY | {str}

Names = tuple[Any, ...]


class ColumnRows(Sequence[Mapping[str, Any]]):
    """Objects given by their columns. Each object is built when it is needed.

    Args:
        columns: The values of all objects, by name; equal lengths.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i: Any) -> Any:
        return {name: column[i] for name, column in self.columns.items()}


def rows_of(
    objects: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
    text: Callable[[int], str],
    reader: json_lines.JsonLines,
    series: AllSeries,
) -> Rows:
    """Reads objects as columns.

    Args:
        objects: The objects in order.
        numbers: Their line numbers.
        text: Returns the text of an object.
        reader: Finds the place of an object if it is not given as plain numbers.
        series: Decides which names are losses or gradient norms, whose values are kept.
    """
    columns = _Columns(objects, series)
    places = {names: _places(names, columns.nested) for names, _ in columns.parts}

    def place(i: int) -> Place:
        found = objects[i]
        quick = _place(found, places.get(tuple(found)))
        return reader.read(found).place if quick is None else quick

    said = {tuple(name is None for name in named or ()) for named in places.values()}
    if len(said) > 1 and any(one[:1] != (False,) for one in said):
        # objects may inherit parts of their places from the previous object
        columns.odd.update(range(len(objects)))
    return Rows(
        dialect=json_lines.NAME,
        numbers=numbers,
        place=place,
        epoch=lambda i: place(i).epoch,
        batches=any(named is None or named[1] is not None for named in places.values()),
        steps=any(named is None or named[2] is not None for named in places.values()),
        text=text,
        columns=columns.joined(),
        bad=columns.bad,
        measured=columns.measured,
        mentions=(),
        odd=columns.odd,
    )


class _Columns:
    """The columns of a list of objects."""

    def __init__(self, objects: Sequence[Mapping[str, Any]], series: AllSeries) -> None:
        self._series = series
        self._columns: dict[str, list[Column]] = {}
        self.bad: dict[int, list[Value]] = {}
        self.odd: set[int] = set()
        self.measured = bytearray(len(objects))
        self.nested = False  # whether nested objects contain an epoch, batch or step
        self._has_text = False  # whether the current objects hold text, which may name a place
        self.parts = _parts(objects)
        for (names, label), at in self.parts.items():
            part = objects if len(at) == len(objects) else [objects[i] for i in at]
            settings = json_lines.is_settings(names) and not any(map(series.judges, names))
            if (
                len(at) < MIN_OBJECTS
                or settings
                or len(names) > json_lines.MAX_VALUES
                or _are_ours(part)
            ):
                self.odd.update(at)
                continue
            self._has_text = not {*names}.isdisjoint(json_lines.TEXTS)
            for name, column in _columns(part):
                long = label if name == "value" and label is not None else name
                self._take(str(long), column, at, 1)

    def joined(self) -> dict[str, Column]:
        """Returns the columns by name, each with its pieces merged."""
        joined: dict[str, Column] = {}
        for name, pieces in self._columns.items():
            if len(pieces) == 1:
                joined[name] = pieces[0]
            else:
                pairs = sorted(chain.from_iterable(zip(*piece, strict=True) for piece in pieces))
                at, values = zip(*pairs, strict=True)
                joined[name] = (at, values)
        return joined

    def _take(self, name: str, column: Sequence[Any], at: Sequence[int], depth: int) -> None:
        kinds = set(map(type, column))
        if not kinds <= _NUMBERS and kinds & _EMPTY:
            kinds -= _EMPTY
            kept = [i for i, value in enumerate(column) if type(value) not in _EMPTY]
            at, column = [at[i] for i in kept], [column[i] for i in kept]
        if kinds <= _NUMBERS:
            self._take_numbers(name, column, at)
        elif kinds == {str}:
            self._take_texts(name, column, at)
        elif kinds <= _NUMBERS | {str} and not self._has_text:  # the string "NaN" among numbers
            for texts in (False, True):
                kept = [i for i, value in enumerate(column) if (type(value) is str) is texts]
                self._take(name, [column[i] for i in kept], [at[i] for i in kept], depth)
        elif kinds == {list}:
            self._take_lists(column, at)
        elif kinds != {dict} or len({*map(tuple, column)}) > 1:
            self.odd.update(at)
        elif depth <= json_lines.DEPTH:
            self.nested |= any(is_place(f"{name}/{key}") for key in column[0])
            for key, inner in _columns(column):
                self._take(f"{name}/{key}", inner, at, depth + 1)

    def _take_numbers(self, name: str, column: Sequence[Any], at: Sequence[int]) -> None:
        try:
            finite = list(map(math.isfinite, column))
        except OverflowError:
            self.odd.update(at)
            return
        if is_place(name) or not column:
            return
        if is_metric(name):
            self._mark(at)
        if not all(finite):
            kept = []
            for i, value in enumerate(column):
                if finite[i]:
                    kept.append(i)
                else:
                    self._take_bad(name, str(value), at[i])
            at, column = [at[i] for i in kept], [column[i] for i in kept]
        if column and self._series.judges(name):
            self._columns.setdefault(name, []).append((at, list(map(float, column))))

    def _take_bad(self, name: str, kind: str, at: int) -> None:
        if not is_bound(name, kind):
            bad = self.bad.setdefault(at, [])
            if len(bad) < json_lines.MAX_BAD:
                bad.append(Value(name, kind))

    def _take_texts(self, name: str, column: Sequence[str], at: Sequence[int]) -> None:
        judged = self._series.judges(name) and not is_place(name)
        if may_have("\n".join(column).lower()):
            kept = []
            for i, text in enumerate(column):
                if not may_have(text.lower()):
                    kept.append(i)
                elif (kind := json_lines.word_of(text)) is None:
                    self.odd.add(at[i])
                elif not is_place(name):
                    self.measured[at[i]] |= is_metric(name)
                    self._take_bad(name, kind, at[i])
            at, column = [at[i] for i in kept], [column[i] for i in kept]  # type: ignore[misc]
        if judged:
            pairs = [(i, json_lines.number_of(text)) for i, text in zip(at, column, strict=True)]
            numbers = [(i, number) for i, number in pairs if number is not None]
            if numbers:
                at, values = zip(*numbers, strict=True)
                self._columns.setdefault(name, []).append((at, values))

    def _take_lists(self, column: Sequence[list[Any]], at: Sequence[int]) -> None:
        flat = list(chain.from_iterable(column))
        while flat and set(map(type, flat)) == {dict}:
            flat = list(chain.from_iterable(map(dict.values, flat)))
        kinds = set(map(type, flat))
        if kinds <= _IN_LISTS and (float not in kinds or _all_finite(flat)):
            return
        simple = (i for i, one in enumerate(column) if not (_is_simple(one) and _all_finite(one)))
        self.odd.update(at[i] for i in simple)

    def _mark(self, at: Sequence[int]) -> None:
        if len(at) == len(self.measured):
            self.measured[:] = b"\1" * len(at)
        else:
            for i in at:
                self.measured[i] = 1


def _columns(part: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, Sequence[Any]]]:
    """The names and columns of objects that all have the same names."""
    if isinstance(part, ColumnRows):
        return part.columns.items()
    # `zip(*map(dict.values, part))` takes 5x as long, since its views trigger garbage collections.
    return ((name, list(map(itemgetter(name), part))) for name in part[0])


def _are_ours(part: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are records or headers of fastguard."""
    return not isinstance(part, ColumnRows) and (are_records([*part]) or all(map(is_header, part)))


def _parts(objects: Sequence[Mapping[str, Any]]) -> dict[tuple[Names, str | None], Sequence[int]]:
    """Groups objects by their names, and by the metric name if they hold a single value."""
    if isinstance(objects, ColumnRows) and "value" not in objects.columns:
        return {(tuple(objects.columns), None): range(len(objects))}
    names = list(map(tuple, objects))
    if len({*names}) == 1 and "value" not in names[0]:
        return {(names[0], None): range(len(objects))}
    parts: dict[tuple[Names, str | None], Any] = {}
    for i, key in enumerate(names):
        label = json_lines.long_name(objects[i]) if "value" in key else None
        parts.setdefault((key, label), []).append(i)
    return parts


def _places(names: Names, nested: bool) -> tuple[str | None, ...] | None:
    """Returns the keys of epoch, batch and step, or None if each object must be searched."""
    if nested or len(names) > json_lines.MAX_VALUES:
        return None
    kinds = [kind_of(name) for name in names]
    if not any(kinds):
        return None
    return tuple(names[kinds.index(kind)] if kind in kinds else None for kind in KINDS)


def _place(found: Mapping[str, Any], named: tuple[str | None, ...] | None) -> Place | None:
    """Returns the place that an object gives as plain numbers, or None."""
    if named is None:
        return None
    epoch, batch, step = (None if name is None else found[name] for name in named)
    if epoch is not None and not (type(epoch) in _NUMBERS and (1e-4 <= epoch < 1e15 or epoch == 0)):
        return None
    for name, value in zip(named[1:], (batch, step), strict=True):
        if name is not None and not (type(value) is int and 0 <= value < 10**15):
            return None
    if named[0] is not None and epoch is None:
        return None
    return Place(None if epoch is None else whole(epoch), None, batch, None, step)


def _all_finite(values: Sequence[Any]) -> bool:
    return all(math.isfinite(value) for value in values if type(value) is float)


def _is_simple(values: Sequence[Any]) -> bool:
    return _IN_LISTS.issuperset(map(type, values))
