"""Finds the lines of a block that must be parsed, without splitting it into lines."""

from __future__ import annotations

import re

from fastguard.commands.scan import huggingface, lightning, plain, ultralytics

_NEEDLES = (
    b"nan",
    b"inf",
    b"finit",  # as in infinite, non-finite and infinity
    b"not a number",
    b"1.#",
    b"gpu_mem",  # the header of an Ultralytics table
    b"invalid loss",
    b"invalid value enc",
    b"scale reached",
    b"scale already",
)
_WORDS = (b"nan", b"inf")
"""Search strings that must end a word, so that "info" and "nano" do not match."""

_JSON = b'\n{"'

ENDS = {
    plain.NAME: plain.MEASURED_BYTES,
    huggingface.NAME: re.compile(rb"['\"]epoch['\"]"),
    lightning.NAME: re.compile(rb"it/s"),
    ultralytics.NAME: re.compile(rb"\d%"),
}
"""Patterns of lower-case lines that may end a stretch, by dialect."""

BAR = re.compile(rb"%\|")
"""Pattern of the progress bars that give the steps of dicts."""


class Suspects:
    """Finds the next suspect in a block.

    Args:
        lines: The block.

    Attributes:
        lower: The block in lower case.
    """

    def __init__(self, lines: bytes) -> None:
        self.lower: bytes = lines.lower()
        self._next = dict.fromkeys((*_NEEDLES, _JSON), -1)
        self._soonest = -1

    def after(self, at: int, *ends: re.Pattern[bytes]) -> int:
        """Offset of the first suspect or match of `ends` from `at` on; the end if there is none."""
        if self._soonest < at:
            for needle, known in self._next.items():
                if known < at:
                    self._next[needle] = self._find(needle, at)
            self._soonest = min(self._next.values())
        soonest = self._soonest
        for pattern in ends:
            if (end := pattern.search(self.lower, at, soonest)) is not None:
                soonest = end.start()
        return soonest

    def _find(self, needle: bytes, at: int) -> int:
        lower = self.lower
        if needle is _JSON:
            if not at and lower.startswith(_JSON[1:]):
                return 0
            at = lower.find(_JSON, max(0, at - 1))
            return len(lower) if at < 0 else at + 1
        at = lower.find(needle, at)
        while at >= 0 and needle in _WORDS:
            after = lower[at + 3 : at + 4]
            if not after.isalpha() or after == b"s":
                break
            at = lower.find(needle, at + 3)
        return len(lower) if at < 0 else at
