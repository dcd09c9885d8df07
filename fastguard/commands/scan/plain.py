"""Parses free-form lines: "epoch 3, batch 15: loss nan", "[3, 2000] loss: inf", and tqdm bars.

The lines of timm, fairseq, Megatron, Keras and nanoGPT are free-form lines.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

from fastguard.commands.scan.places import where_in, without_launcher
from fastguard.commands.scan.reading import NOWHERE, Place, Reading, Where
from fastguard.commands.scan.values import nonfinite_values

NAME = "plain"

_MEASURED = re.compile(
    r"(?:loss|norm|acc|accuracy|ppl|mse|mae|err|error)\w{0,40}[\"']?\s*[=:]?\s*[\"'(\[]*[+-]?\d",
    re.IGNORECASE,
)
MEASURED_BYTES = re.compile(
    rb"(?:loss|norm|acc|ppl|mse|mae|err)[\w\x80-\xff]{0,160}[\"']?[^\S\n]*[=:]?[^\S\n]*[\"'(\[]*"
    rb"[+-]?[\d\x80-\xff]"
)
"""Matches slightly more than `_MEASURED`, in lower-case UTF-8, over many lines at once."""

MEASURED_IN = 2000
"""Number of characters of a line that are searched for a finite loss."""

# in log lines of fastguard, where it marks a step that is not an incident
LOSS_SCALE = "skipped because of loss_scale: "


NOWHERE_IN = Where()
NOT_ASKED = Where(*[(0, 0)] * 5)
"""Placeholder for a place that has not been looked up yet."""


def may_measure(text: str) -> bool:
    """Whether a line reports a finite loss, norm or similar value."""
    return _MEASURED.search(text, 0, MEASURED_IN) is not None


class Plain:
    """Parses lines that no other dialect accepts."""

    def read(self, text: str) -> Reading | None:
        """Parses a line; None if it says nothing about a run."""
        where = where_in(text)
        place = where.place(text)
        if LOSS_SCALE in text:
            return Reading(NAME, place, (), False, where)
        bad, _ = nonfinite_values(without_launcher(text))
        measured = bool(bad) or may_measure(text)
        if not measured and place == NOWHERE:
            return None
        return Reading(NAME, place, bad, measured, where)


class Passed:
    """The last good lines, whose place is needed if the next bad line does not give one.

    Parsing a line takes twenty times as long as skipping it, so lines are kept unparsed: the last
    line that names an epoch, and up to `KEPT` lines after it.

    Args:
        where: Returns which bytes of a line name its place.
        is_setting: Whether a line belongs to a list of settings.
    """

    KEPT = 16
    TRIED = 8
    """Maximum number of lines with "epoch" that are parsed, from the last one backward."""

    TAIL = 1 << 13
    """Maximum number of trailing bytes kept of lines that are not parsed."""

    PENDING = 64
    """Maximum number of lines and blocks kept unparsed."""

    def __init__(
        self, where: Callable[[bytes], Where], is_setting: Callable[[bytes], bool]
    ) -> None:
        self._where = where
        self._is_setting = is_setting
        self._lines: deque[tuple[Where, bytes]] = deque(maxlen=self.KEPT)
        self._epoch: tuple[Where, bytes] | None = None
        # most of these lines are never parsed
        self._pending: list[bytes | tuple[Where, bytes]] = []

    def add(self, where: Where, line: bytes) -> None:
        """Adds a line whose place is known."""
        self._pending.append((where, line))
        if len(self._pending) > self.PENDING:
            self._settle()

    def add_all(self, lines: bytes) -> None:
        """Adds lines that are not parsed."""
        self._pending.append(lines)
        if len(self._pending) > self.PENDING or len(lines) > self.TAIL:
            self._settle()

    def place(self, last: Place) -> Place:
        """Returns where the lines ended, given where they began, and drops them."""
        self._settle()
        if self._epoch is not None:
            where, line = self._epoch
            last = where.place(line).within(last)
        for where, line in self._lines:
            last = (self._where(line) if where is NOT_ASKED else where).place(line).within(last)
        self.forget()
        return last

    def forget(self) -> None:
        """Drops the lines, after a line that names an epoch itself."""
        self._pending.clear()
        self._lines.clear()
        self._epoch = None

    def _settle(self) -> None:
        for item in self._pending:
            if isinstance(item, bytes):
                self._take_all(item)
            else:
                self._take(*item)
        self._pending.clear()

    def _take(self, where: Where, line: bytes) -> None:
        if where.epoch is not None:
            self._lines.clear()
            self._epoch = (where, line)
        else:
            self._lines.append((where, line))

    def _take_all(self, lines: bytes) -> None:
        end = len(lines)
        settings = set()
        for _ in range(self.TRIED):
            at = max(lines.rfind(word, 0, end) for word in (b"poch", b"POCH", b"ep ", b"ep="))
            if at < 0:
                break
            begin, after = lines.rfind(b"\n", 0, at) + 1, lines.find(b"\n", at)
            after = len(lines) if after < 0 else after
            if self._is_epoch(lines, begin, after):
                line = lines[begin:after]
                self._take(self._where(line), line)
                lines = lines[after + 1 :]
                break
            settings.add(lines[begin:after])
            end = begin
        for line in lines[-self.TAIL :].split(b"\n")[-self.KEPT - 1 :]:
            if line:
                self._lines.append((NOWHERE_IN if line in settings else NOT_ASKED, line))

    def _is_epoch(self, lines: bytes, begin: int, after: int) -> bool:
        line = lines[begin:after]
        if self._where(line).epoch is None:
            return False
        if line.count(b":") + line.count(b"=") != 1 or len(line) > 60:
            return True
        # "epoch: 200" among "batch_size: 16" and "lr: 0.1" is a setting of the run.
        before = lines[lines.rfind(b"\n", 0, max(0, begin - 1)) + 1 : max(0, begin - 1)]
        if not begin and self._lines:
            before = self._lines[-1][1]
        behind = lines[after + 1 : max(lines.find(b"\n", after + 1), after + 1)]
        return not (self._is_setting(before) or self._is_setting(behind))
