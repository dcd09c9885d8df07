"""Rows of finite numbers, which are judged together: by columns it takes a tenth of the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fastguard.commands.scan.reading import Place


class Rows(NamedTuple):
    """Rows of a log that is data, in their order, without a NaN or Inf.

    Attributes:
        lines: Their lines.
        place: Gives what the row at an index says of its place; each says the same parts of it.
        columns: By name the indices and values of each series that is judged.
        measured: Whether a row tells of losses or norms.
    """

    lines: Sequence[int]
    place: Callable[[int], Place]
    columns: Mapping[str, tuple[Sequence[int], list[float]]]
    measured: bool
