"""One number per layer over the watched steps of a run, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fastguard.errors import MAX_NAME_LENGTH
from fastguard.errors.plain_text import printable

COLUMNS = 96
"""Maximum number of columns."""

MAX_LAYERS = 256
"""Maximum number of layers; further layers are left out."""

GREW = 10.0
"""A layer has grown if its value is this many times its usual value."""

_SETTLED = 8  # number of values before there is a usual value
_MEMORY = 16  # number of values that the usual value is averaged over


class Growth(NamedTuple):
    """A layer whose value left its usual range.

    Attributes:
        step: The step at which the value left its range.
        layer: The layer.
        factor: The value at that step, divided by the usual value.
    """

    step: int
    layer: str
    factor: float


@dataclass(slots=True)
class _Layer:
    """One layer.

    Attributes:
        cells: The largest value in each column and its step.
        count: Number of values.
        log_sum: Sum of the logarithms of the values.
        usual: The logarithm of the usual value: a moving average.
        grew_at, factor: See `Growth`; `grew_at` is None while the layer is within its usual range.
        grown: Whether two consecutive values were outside the usual range. A single value counts as
            an outlier, unless it is the last value.
    """

    cells: dict[int, tuple[float, int]] = field(default_factory=dict)
    count: int = 0
    log_sum: float = 0.0
    usual: float = 0.0
    grew_at: int | None = None
    factor: float = 1.0
    grown: bool = False

    def take(self, step: int, value: float) -> None:
        log = math.log(value)
        self.count += 1
        self.log_sum += log
        if self.grown:
            return
        if self.count > _SETTLED and log > self.usual + math.log(GREW):
            if self.grew_at is None:
                self.grew_at, self.factor = step, math.exp(min(log - self.usual, 700.0))
            else:
                self.grown = True
            return
        self.grew_at = None
        self.usual += (log - self.usual) / min(self.count, _MEMORY)


class LayerHistory:
    """The largest value of each layer per column of steps.

    Attributes:
        shift: A column holds the watched steps of `2**shift` steps.
    """

    def __init__(self) -> None:
        self.shift: int = 0
        self._layers: dict[str, _Layer] = {}
        self._columns: dict[int, int] = {}  # the first watched step of each column

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a watched step, positive numbers by layer."""
        if not values:
            return
        self._columns.setdefault(step >> self.shift, step)
        while len(self._columns) > COLUMNS:
            self._halve()
        for name, value in values.items():
            name = printable(name, MAX_NAME_LENGTH)
            if name not in self._layers and len(self._layers) >= MAX_LAYERS:
                continue
            layer = self._layers.setdefault(name, _Layer())
            layer.take(step, value)
            key = step >> self.shift
            layer.cells[key] = max(layer.cells.get(key, (0.0, step)), (value, step))

    def _halve(self) -> None:
        self.shift += 1
        columns: dict[int, int] = {}
        for key, step in self._columns.items():
            columns[key >> 1] = min(step, columns.get(key >> 1, step))
        self._columns = columns
        for layer in self._layers.values():
            cells: dict[int, tuple[float, int]] = {}
            for key, cell in layer.cells.items():
                cells[key >> 1] = max(cell, cells.get(key >> 1, cell))
            layer.cells = cells

    @property
    def layers(self) -> list[str]:
        """The layers, in the order in which they were first seen."""
        return list(self._layers)

    @property
    def columns(self) -> list[tuple[int, int]]:
        """`(key, first watched step)` of each column, in order."""
        return sorted(self._columns.items())

    def cells(self, layer: str) -> dict[int, tuple[float, int]]:
        """`(largest value, its step)` of a layer by the key of the column."""
        return self._layers[layer].cells

    def count(self, layer: str) -> int:
        """The number of watched steps with a value for this layer."""
        return self._layers[layer].count

    def mean(self, layer: str) -> float:
        """The geometric mean over all watched steps."""
        return math.exp(self._layers[layer].log_sum / self._layers[layer].count)

    def growths(self) -> list[Growth]:
        """The layers that grew to ten times their usual value or more, in order of the step."""
        found = [
            Growth(layer.grew_at, name, layer.factor)
            for name, layer in self._layers.items()
            if layer.grew_at is not None
        ]
        return sorted(found, key=lambda growth: (growth.step, -growth.factor))
