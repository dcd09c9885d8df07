"""The screen of `fastguard monitor`, redrawn for the current size of the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fastguard.commands.monitor.run_state import RunState, is_incident
from fastguard.commands.monitor.sparkline import ASCII_BARS, BARS, sparkline, split_evenly
from fastguard.commands.monitor.summary import counts, duration, layers, named, verdict
from fastguard.commands.terminal import printable
from fastguard.records.step_record import StepRecord

LOSSES = 4
"""Number of losses that are drawn as curves; further losses are listed by name."""

NAMED = 32
"""Maximum number of losses listed by name without a curve."""

COLORS = {"skipped": "red", "sanitized": "yellow", "clipped": "yellow", "applied": "yellow"}


@dataclass
class Screen:
    """Renders the whole screen; long lines end in an ellipsis instead of wrapping.

    Attributes:
        run: The path that the user gave.
        state: The state of the run.
        activity: The text to show while there is no record.
        rate: Steps per second, or None while unknown.
        age: Seconds since the last write, or None.
    """

    run: Path
    state: RunState
    activity: str = "reading"
    rate: float | None = None
    age: float | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.size.height
        bars = ASCII_BARS if options.ascii_only else BARS
        lines = list(self._head(options.max_width, bars))
        foot = Text("Ctrl-C to quit", style="dim")
        for line in [*lines, *self._incidents(height - len(lines) - 1), foot]:
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line

    def _head(self, width: int, bars: str) -> Iterator[Text]:
        latest = self.state.latest
        color = "green" if not self.state.incidents_in_window else "yellow"
        if latest is not None and latest.consecutive_skips:
            color = "red"
        yield Text(printable(f"fastguard monitor {self.run}") + named(self.state), style="bold")
        if latest is None and self.state.damaged:
            yield Text(f"no records yet; {counts(self.state)}")
            return
        if latest is None:
            yield Text(f"{self.activity} ...")
            return
        yield Text(verdict(self.state), style=f"bold {color}")
        yield Text(self._position(latest))
        drawn = list(latest.losses)[:LOSSES]
        label = min(max(map(len, ["norm", *drawn])), 16)
        records = list(self.state.curve)
        yield self._curve("norm".ljust(label), records, lambda r: r.torch_norm, width, bars)
        for name in drawn:
            text = printable(name)[:label].ljust(label)
            yield self._curve(
                text, records, lambda r, name=name: r.losses.get(name, math.nan), width, bars
            )
        if len(latest.losses) > LOSSES:
            others = ", ".join(map(printable, list(latest.losses)[LOSSES : LOSSES + NAMED]))
            yield Text(f"and {others}", style="dim")
        yield Text(counts(self.state))
        if self.state.layers:
            yield Text(layers(self.state))

    def _position(self, latest: StepRecord) -> str:
        rate = "..." if self.rate is None else f"{self.rate:.3g}"
        parts = [f"step {latest.step:,}", f"{rate} steps/s", f"lr {latest.lr:.4g}"]
        parts.append(f"clip_coef {latest.clip_coef:.4g}")
        if self.age is not None:
            parts.append(f"written {duration(self.age)} ago")
        return "   ".join(parts)

    def _curve(
        self,
        name: str,
        records: list[StepRecord],
        value: Callable[[StepRecord], float],
        width: int,
        bars: str,
    ) -> Text:
        """A curve, red where a step was an incident."""
        text = Text(f"{name} {value(records[-1]):>9.4g} ")
        start, room = len(text), max(1, width - len(text))
        text.append(sparkline([value(r) for r in records], room, bars), style="cyan")
        for i, share in enumerate(split_evenly(records, room)):
            if any(map(is_incident, share)):
                text.stylize("red", start + i, start + i + 1)
        return text

    def _incidents(self, room: int) -> Iterator[Text]:
        if self.state.latest is None:
            return
        found = self.state.n_incidents
        yield Text("")
        yield Text(f"{found:,} incident{'s' * (found != 1)} in {self.state.n_records:,} steps")
        for record in islice(reversed(self.state.incidents), max(0, room - 2)):
            yield Text(printable(str(record)), style=COLORS.get(record.action, ""))
