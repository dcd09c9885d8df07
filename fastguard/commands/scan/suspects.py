"""Where in a block of lines a line must be read: the others are passed at the speed of memory."""

from __future__ import annotations

_NEEDLES = (
    b"nan",
    b"inf",
    b"finit",  # infinite, non-finite, infinity
    b"1.#",
    b"gpu_mem",  # the head of a table of Ultralytics
    b"invalid loss",
    b"scale reached",
    b"scale already",
)
_WORDS = 2
"""The first needles are words that end there: "info" and "nano" are none."""


class Suspects:
    """Finds the next suspect of a block.

    Args:
        lines: The block.
    """

    def __init__(self, lines: bytes) -> None:
        self._lower = lines.lower()
        self._next = [0] * len(_NEEDLES)
        for i in range(len(_NEEDLES)):
            self._next[i] = self._find(i, 0)

    def after(self, at: int) -> int:
        """Where the first suspect from `at` on is, or -1."""
        best = -1
        for i, known in enumerate(self._next):
            if 0 <= known < at:
                known = self._next[i] = self._find(i, at)
            if known >= 0 and (best < 0 or known < best):
                best = known
        return best

    def _find(self, i: int, at: int) -> int:
        lower, needle = self._lower, _NEEDLES[i]
        at = lower.find(needle, at)
        while at >= 0 and i < _WORDS:
            after = lower[at + 3 : at + 4]
            if not after.isalpha() or after == b"s":
                break
            at = lower.find(needle, at + 3)
        return at
