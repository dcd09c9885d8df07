"""Ending a run on SIGTERM at a moment when its state is whole.

A handler may run between any two bytecodes, in the middle of an optimizer step, so it does nothing
but remember. `CheckpointStore.maybe_save` looks, at a place that the training loop has chosen.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


class SignalFlag:
    """Remembers that a signal came; the handlers of before are back after `restore()`.

    Use it as a context manager, or call `restore()`.
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
                raise ValueError(f"cannot handle signal {number!r}: {error}") from None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker, which never gets to maybe_save
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        # Launchers send SIGTERM more than once (to the process and to its group): a second one must
        # not end a save that the first one asked for.
        self.received = number

    def restore(self) -> None:
        """Puts the previous handlers back; harmless if done before."""
        for number, handler in self._previous.items():
            # None: installed by C code, which Python cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def __enter__(self) -> SignalFlag:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
