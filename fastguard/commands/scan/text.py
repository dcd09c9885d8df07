"""Reads lines of text in batches, which are looked up by shape in C."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator

from fastguard.commands.scan.bare import bare_lines
from fastguard.commands.scan.budget import IN_RUN, KNOWN, Budget, n_lines
from fastguard.commands.scan.cursor import Cursor
from fastguard.commands.scan.findings import Findings
from fastguard.commands.scan.found import Run
from fastguard.commands.scan.huggingface import bare_bar
from fastguard.commands.scan.insets import may_be_inset
from fastguard.commands.scan.lines import text_of
from fastguard.commands.scan.shapes import Shape, Shapes, alike
from fastguard.commands.scan.suspects import BAR, ENDS

MIN_BATCH, MAX_BATCH = 1 << 11, 1 << 16
"""First and largest size of a batch in bytes. The size doubles when a batch is read to its end."""

REFRESHED = (1, 8, 64)
"""After this many new shapes in a batch, its remaining lines are looked up again."""


class TextReader:
    """Reads lines of text.

    Args:
        shapes: Parses the lines.
        findings: Receives the results.
        budget: The budget for lines that are handled individually.
        take_inset: Reads structured data at the cursor, or begins a table there; returns whether
            there is any.
    """

    def __init__(
        self,
        shapes: Shapes,
        findings: Findings,
        budget: Budget,
        take_inset: Callable[[Cursor], bool],
    ) -> None:
        self._shapes = shapes
        self._findings = findings
        self._budget = budget
        self._take_inset = take_inset
        self._size = MIN_BATCH

    def take(self, cursor: Cursor) -> None:
        """Reads lines up to the next JSON object, or until the budget is spent."""
        if self._findings.run is None:
            self._pass(cursor, cursor.suspect(*self._ends()))
            if cursor.done or cursor.starts(b'{"'):
                return
        if (bare := bare_lines(cursor.lines, cursor.at)) is not None:
            if may_be_inset(cursor.line()) and self._take_inset(cursor):
                return
            self._budget.spend(KNOWN)
            self.take_line(cursor.number, cursor.line())
            self._findings.take_bare(bare, cursor.number_at(max(cursor.at, bare.last)))
            cursor.at = bare.end
            return
        if self._findings.run is not None:
            self._take_alike(cursor, self._findings.run)
            if cursor.done:
                return
        whole = self._take_batch(cursor)
        self._size = min(2 * self._size, MAX_BATCH) if whole else MIN_BATCH

    def take_line(self, number: int, line: bytes, shape: Shape | None = None) -> None:
        """Reads one line."""
        findings = self._findings
        if findings.dicts and findings.stretch is not None and b"%|" in line:
            step = bare_bar(text_of(line))
            if step is not None:
                findings.end_run()
                findings.take_step(step)
                return
        findings.text(number, line, shape or self._shapes.of(line))

    def _take_alike(self, cursor: Cursor, run: Run) -> None:
        """Reads the next lines, if they differ from the last bad one only in digits."""
        where, line = run.last
        if (end := alike(cursor.lines, cursor.at, line, where)) > cursor.at:
            stride = len(line) + 1
            run.extend_alike(cursor.number_at(end - stride), cursor.lines[cursor.at : end], stride)
            self._findings.found.n_lines += (end - cursor.at) // stride
            cursor.at = end

    def _take_batch(self, cursor: Cursor) -> bool:
        """Reads the next lines; returns whether the batch was read to its end."""
        findings = self._findings
        lines, starts, numbers = cursor.batch(self._size)
        shapes, generation = self._shapes.all_known(lines), self._shapes.generation
        i, n, taken, misses = 0, len(lines), 0, 0
        while i < n:
            line, shape = lines[i], shapes[i]
            if shape is None or not self._matters(shape):
                if not line or line.isspace():
                    i += 1
                    continue
                suspect = cursor.suspect_after(starts[i], *self._ends())
                if suspect >= starts[i + 1]:
                    findings.end_run()
                    cursor.at = starts[i]
                    i = bisect_right(starts, suspect, i, n) - 1 if suspect < starts[n] else n
                    self._pass(cursor, starts[i])
                    continue
            if shape is None:
                if may_be_inset(line):
                    cursor.at = starts[i]
                    if self._take_inset(cursor):
                        findings.found.n_lines += taken
                        return False
                if i and self._is_other(cursor, starts[i], line):
                    break
                shape = self._shapes.of(line)
                misses += 1
                if misses in REFRESHED and i + 1 < n:  # the next lines may have this new shape
                    shapes[i + 1 :] = self._shapes.all_known(lines[i + 1 :])
            end, run = i + 1, findings.run
            if run is not None and shape.bad:
                while end < n and shapes[end] is shape:
                    end += 1
                end = i + run.extend(numbers[i:end], lines[i:end], shape)
            if run is None or end == i or not shape.bad:
                self.take_line(numbers[i], line, shape)
                self._budget.spend(KNOWN)
                end = i + 1
            taken += end - i
            i = end
            if self._shapes.generation != generation or self._budget.spent:
                break
        cursor.at = starts[i]
        findings.found.n_lines += taken
        self._budget.spend(taken // IN_RUN)
        return i == n

    def _matters(self, shape: Shape) -> bool:
        """Whether a line of a known shape is a finding, a mention, or ends the stretch."""
        stretch = self._findings.stretch
        ends = stretch is not None and shape.measured and shape.dialect == stretch.dialect
        return bool(shape.bad) or shape.suspect or ends

    def _is_other(self, cursor: Cursor, at: int, line: bytes) -> bool:
        """Whether the batch ends at a line: JSON, lines of numbers, or the budget is spent."""
        if line.startswith(b'{"') and line.rstrip().endswith(b"}"):
            return True
        return self._budget.spent or bare_lines(cursor.lines, at) is not None

    def _pass(self, cursor: Cursor, end: int) -> None:
        """Skips lines without NaN, Inf and structured data."""
        lines = cursor.lines[cursor.at : end]
        cursor.at = end
        if lines:
            self._findings.found.n_lines += n_lines(lines)
            self._findings.passed.add_all(lines)

    def _ends(self) -> Iterator[re.Pattern[bytes]]:
        """Patterns of lines that may end the current stretch or give its step."""
        stretch = self._findings.stretch
        if stretch is not None:
            if stretch.dialect in ENDS:
                yield ENDS[stretch.dialect]
            if self._findings.dicts:
                yield BAR
