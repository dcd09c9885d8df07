"""`Findings`: merges the bad lines of a log into stretches.

A running mean that becomes NaN stays NaN until its epoch ends, which may take ten thousand lines.
The bad lines of an epoch are therefore merged into one stretch, which ends at a line of the same
dialect with only finite measurements. Memory does not depend on the length of the log.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from fastguard.commands.scan import huggingface
from fastguard.commands.scan.bare import Bare
from fastguard.commands.scan.budget import EXCERPT, JUDGED, PLACED, VALUE, Budget
from fastguard.commands.scan.found import LogScan, Run, Stretch
from fastguard.commands.scan.lines import Line, text_of
from fastguard.commands.scan.plain import Passed
from fastguard.commands.scan.reading import NOWHERE, Place, Reading
from fastguard.commands.scan.rows import Rows
from fastguard.commands.scan.series import AllSeries
from fastguard.commands.scan.shapes import Shape, Shapes
from fastguard.commands.scan.spellings import first_nonfinite
from fastguard.commands.scan.values import Value, has_nonfinite

KEPT = 1000
"""Maximum number of stretches kept individually; further stretches are only counted."""

STEPS = 10
"""Maximum number of steps kept per stretch."""

TAIL = 1 << 16
"""In lines that are only counted, number of trailing bytes that are searched for a place."""


class Findings:
    """Tracks the current place in the run and the current stretch.

    Args:
        shapes: Finds the place in a line of text.
        budget: The budget for the places of bad rows.

    Attributes:
        found: The results so far.
        series: The losses and gradient norms.
        passed: The good lines before the current one.
        place: The place in the run of the last line.
        stretch: The current stretch.
        run: The consecutive bad lines that end with the last line; None if it was good.
        dicts: Whether the log holds dicts, whose steps are given by the progress bar after them.
    """

    def __init__(self, shapes: Shapes, budget: Budget) -> None:
        self._budget = budget
        self.found: LogScan = LogScan()
        self.series: AllSeries = AllSeries()
        self.passed: Passed = Passed(shapes.where, shapes.is_setting)
        self.place: Place = NOWHERE
        self.stretch: Stretch | None = None
        self.run: Run | None = None
        self.dicts: bool = False
        self._without_step: Stretch | None = None

    def ends_stretch(self, dialect: str | None) -> None:
        """Ends the stretch: a line of this dialect shows that the run is finite again."""
        if self.stretch is not None and self.stretch.dialect == dialect:
            self.stretch = None

    def text(self, number: int, line: bytes, shape: Shape) -> None:
        """Adds a line of text."""
        self.end_run()
        self.dicts |= shape.dialect == huggingface.NAME
        if not shape.bad:
            if shape.suspect:
                self.mention(number, line)
            if shape.dialect is None:
                self.passed.add_all(line)
            else:
                self.passed.add(shape.where, line)
            if shape.measured:
                self.ends_stretch(shape.dialect)
            return
        place = shape.where.place(line)
        if place.epoch is None:
            self.place = place.within(self.passed.place(self.place))
        else:
            self.place = place
            self.passed.forget()
        self.bad(number, line, shape.dialect or "", shape.bad)
        self.run = Run(shape, line)

    def bad(self, number: int, line: bytes, dialect: str, bad: tuple[Value, ...]) -> None:
        """Adds a line with NaN or Inf values at the current place."""
        self.found.n_bad += 1
        stretch = self.stretch
        if stretch is None or self._is_other_epoch(stretch):
            stretch = self._begin(number, line, dialect)
        stretch.last_line = number
        if (self.place.batch or 0) >= (stretch.last.batch or 0):  # not if a bar was redrawn at 0
            stretch.last = self.place
        stretch.n_lines += 1
        stretch.count(bad, 1)
        self._without_step = stretch if self.dicts and self.place.step is None else None

    def _begin(self, number: int, line: bytes, dialect: str) -> Stretch:
        self.stretch = stretch = self._new_stretch(number, dialect)
        self.found.n_stretches += 1
        if len(self.found.stretches) < KEPT:
            stretch.excerpt = _excerpt(text_of(line[: 8 * EXCERPT]))
            self.found.stretches.append(stretch)
        return stretch

    def _new_stretch(self, number: int, dialect: str) -> Stretch:
        return Stretch(
            dialect=dialect,
            first_line=number,
            last_line=number,
            first=self.place,
            last=self.place,
            n_lines=0,
            values=Counter(),
            excerpt="",
        )

    def end_run(self) -> None:
        """Adds the lines of the current run to the stretch."""
        run, stretch = self.run, self.stretch
        self.run = None
        if run is None or stretch is None or not run.n:
            return
        self.found.n_bad += run.n
        stretch.n_lines += run.n
        stretch.last_line = run.number
        for bad, n in run.bad.items():
            stretch.count(bad, n)
        (where, last), (where_furthest, furthest_line) = run.last, run.furthest
        self.place = where.place(last).within(self.place)
        furthest = where_furthest.place(furthest_line).within(self.place)
        if (furthest.batch or 0) >= (stretch.last.batch or 0):
            stretch.last = furthest
        self._without_step = stretch if self.dicts and self.place.step is None else None

    def mention(self, number: int, line: bytes) -> None:
        """Adds a line that contains NaN or Inf as a word but not as a value."""
        self.found.n_mentions += 1
        if self.found.mention is None:
            self.found.mention = Line(number, _around_word(text_of(line)))

    def take_step(self, step: int) -> None:
        """Sets the step of a bad dict from the bar that follows it."""
        stretch = self._without_step
        if stretch is None:
            return
        stretch.last = stretch.last._replace(step=step)
        if stretch.n_lines == 1:
            stretch.first = stretch.last
        self._without_step = None

    def take_bare(self, bare: Bare, last_line: int) -> None:
        """Adds lines of numbers; the first line was added before."""
        self.end_run()
        self.found.n_lines += 1 + bare.n
        stretch = self.stretch
        if stretch is not None and bare.n_bad:
            self.found.n_bad += bare.n_bad
            stretch.n_lines += bare.n_bad
            stretch.last_line = last_line
            for value, n in bare.kinds.items():
                stretch.count((value,), n)

    def count(self, number: int, lines: bytes, last_line: int) -> None:
        """Adds lines that are only searched for NaN and Inf."""
        if lines:
            self.found.n_lines += self.found.counted.add(number, lines, last_line)
            self.passed.add_all(lines[-TAIL:].partition(b"\n")[2] if len(lines) > TAIL else lines)

    def data(self, number: int, reading: Reading, text: str) -> None:
        """Adds a line of structured data."""
        self.end_run()
        self.passed.forget()
        self.place = reading.place.within(self.place)
        for name, value in reading.numbers.items():
            self.series.take(name, number, self.place, value)
        if reading.unread:
            rest = reading.unread.replace("\n", " ")
            self.found.counted.add(number, rest.encode(errors="replace"), number)
        if reading.bad:
            self.bad(number, text.encode(errors="replace"), reading.dialect, reading.bad)
            self._add_step()
            return
        if text and has_nonfinite(text):
            self.mention(number, text.encode(errors="replace"))
        if reading.measured:
            self.ends_stretch(reading.dialect)

    def judge(self, rows: Rows, read: Callable[[int], None]) -> None:
        """Adds rows; `read` is called with the index of each odd row."""
        self.found.n_lines += len(rows.numbers)
        done, bad = 0, sorted(rows.bad)
        for begin, end in rows.parts():
            for i in range(done, begin):
                read(i)
            self._judge_part(rows, begin, end, bad[bisect_left(bad, begin) : bisect_left(bad, end)])
            done = end
        for i in range(done, len(rows.numbers)):
            read(i)

    def _judge_part(self, rows: Rows, begin: int, end: int, bad: Sequence[int]) -> None:
        self.end_run()
        self.passed.forget()
        before = self.place
        for name, at, values in rows.series(begin, end):
            alone = self.series.take_all(
                name,
                rows.numbers[at[0] : at[-1] + 1]
                if len(at) == at[-1] + 1 - at[0]
                else [rows.numbers[i] for i in at],
                lambda i, at=at: rows.place(at[i]).within(before),
                values,
            )
            self._budget.spend(JUDGED * alone)
        mentions = rows.mentions[
            bisect_left(rows.mentions, begin) : bisect_left(rows.mentions, end)
        ]
        for i in mentions:
            self.mention(rows.numbers[i], rows.text(i).encode(errors="replace"))
        self._budget.spend(sum(PLACED + VALUE * len(rows.bad[i]) for i in bad))
        at = 0
        while at < len(bad):
            i = bad[at]
            self._again_finite(rows, begin, i)
            if self._is_not_kept():
                begin = self._count_rows(rows, begin, bad[at:])
                break
            if n := self._extend(rows, begin, bad, at):
                at, begin = at + n, bad[at + n - 1] + 1
                continue
            self._move_to(rows, begin, i)
            text = rows.text(i) if self._needs_excerpt() else ""
            self.bad(
                rows.numbers[i], text.encode(errors="replace"), rows.dialect, tuple(rows.bad[i])
            )
            self._add_step()
            at, begin = at + 1, i + 1
        self._again_finite(rows, begin, end)
        self.place = rows.place(end - 1).within(self.place)

    def _extend(self, rows: Rows, begin: int, bad: Sequence[int], at: int) -> int:
        """Adds the bad rows from index `at` on that continue the stretch; returns their number.

        The first rows of a stretch are added individually, since their steps are kept.
        """
        stretch = self.stretch
        if stretch is None or rows.batches or stretch.last.batch is not None:
            return 0
        if rows.steps and len(stretch.steps) < STEPS:
            return 0
        wanted, n, epoch = _whole(stretch.first.epoch), at, self.place.epoch
        for found, again_finite in self._walk(rows, begin, islice(bad, at, None)):
            if _whole(found) != wanted or (n > at and again_finite):
                break
            n, epoch = n + 1, found
        if n == at:
            return 0
        last = rows.place(bad[n - 1])
        sparse = last.step is None and self.place.step is not None
        self.place = self.place._replace(epoch=epoch)
        for i in bad[at:n] if sparse else bad[n - 1 : n]:
            self._move_to(rows, begin, i)
        self.found.n_bad += n - at
        stretch.n_lines += n - at
        stretch.last_line, stretch.last = rows.numbers[bad[n - 1]], self.place
        for values, m in Counter([tuple(rows.bad[i]) for i in bad[at:n]]).items():
            stretch.count(values, m)
        self._without_step = stretch if self.dicts and self.place.step is None else None
        return n - at

    def _move_to(self, rows: Rows, begin: int, i: int) -> None:
        """Sets the place to the place of row i; `begin` is the first row that was not read yet."""
        place = rows.place(i)
        if place.epoch is None and begin < i:  # the previous row may be more specific
            self.place = rows.place(i - 1).within(self.place)
        self.place = place.within(self.place)

    def _is_not_kept(self) -> bool:
        """Whether the next bad line belongs to a stretch that is only counted."""
        kept = self.found.stretches
        return len(kept) == KEPT and (self.stretch is None or self.stretch is not kept[-1])

    def _count_rows(self, rows: Rows, begin: int, bad: Sequence[int]) -> int:
        """Counts bad rows whose stretches are not kept; returns the end of the last one."""
        stretch, n, epoch = self.stretch, 0, None
        ends = stretch is not None and stretch.dialect == rows.dialect
        opened = None if stretch is None else (_whole(stretch.first.epoch),)
        for epoch, again_finite in self._walk(rows, begin, bad):
            now = (_whole(epoch),)
            if (ends and again_finite) or opened != now:
                n, opened, ends = n + 1, now, True
        self.place = self.place._replace(epoch=epoch)
        self._move_to(rows, begin, bad[-1])
        self.found.n_bad += len(bad)
        self.found.n_stretches += n
        if n:
            self.stretch = self._new_stretch(rows.numbers[bad[-1]], rows.dialect)
        return bad[-1] + 1

    def _walk(
        self, rows: Rows, begin: int, bad: Iterable[int]
    ) -> Iterator[tuple[float | None, bool]]:
        """Yields the epoch of each bad row, and whether finite measurements precede it."""
        epoch = self.place.epoch
        for i in bad:
            found = rows.epoch(i)
            if found is None and begin < i:  # the previous row may be more specific
                found = rows.epoch(i - 1)
            epoch = epoch if found is None else found
            yield epoch, rows.measured.find(1, begin, i) >= 0
            begin = i + 1

    def _again_finite(self, rows: Rows, begin: int, end: int) -> None:
        """Ends the stretch if a row in this range has finite measurements."""
        if rows.measured.find(1, begin, end) >= 0:
            self.ends_stretch(rows.dialect)

    def _add_step(self) -> None:
        stretch, step = self.stretch, self.place.step
        if stretch and step is not None and len(stretch.steps) < STEPS:
            if not stretch.steps or stretch.steps[-1] != step:
                stretch.steps.append(step)

    def _needs_excerpt(self) -> bool:
        """Whether the next bad line begins a stretch that is kept."""
        stretch = self.stretch
        begins = stretch is None or self._is_other_epoch(stretch)
        return begins and len(self.found.stretches) < KEPT

    def _is_other_epoch(self, stretch: Stretch) -> bool:
        return _whole(stretch.first.epoch) != _whole(self.place.epoch)


def _excerpt(text: str) -> str:
    return " ".join(text.split())[:EXCERPT]


def _around_word(text: str) -> str:
    """Cuts a long line to start shortly before its NaN or Inf."""
    start = max(0, first_nonfinite(text) - EXCERPT // 2)
    end = start + EXCERPT
    return "..." * (start > 0) + _excerpt(text[start:end]) + "..." * (end < len(text))


def _whole(epoch: float | None) -> int | None:
    return None if epoch is None else math.floor(epoch)
