"""Stops a run on SIGTERM at a point where its state is consistent.

A signal handler may run between any two bytecodes, in the middle of an optimizer step, so it only
sets a flag. `CheckpointStore.maybe_save` checks the flag where the training loop calls it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


class SignalFlag:
    """Records that a signal was received.

    As a context manager, it reinstalls the previous handlers at the end of the block; so does
    `restore()`.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self._pid = os.getpid()
        self.received: int | None = None
        self._previous: dict[int, Handler] = {}
        for number in signals:
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError as error:
                self.restore()
                raise ValueError(
                    f"cannot handle signal {number!r}: {error}; call this in the main thread, with "
                    "a signal that a process can handle"
                ) from None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker, which never calls maybe_save
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        # Launchers send SIGTERM more than once (to the process and to its group); the second signal
        # must not interrupt the save that the first one requested.
        self.received = number

    def restore(self) -> None:
        """Reinstalls the previous handlers; calling it again has no effect."""
        for number, handler in self._previous.items():
            # None: installed by C code; Python cannot restore it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def __enter__(self) -> SignalFlag:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
