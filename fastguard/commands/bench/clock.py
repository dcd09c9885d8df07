"""Times one call: wall time and, on a GPU, host and device time separately.

On a GPU each call is timed twice. The first time, the device is idle: the time until the device is
idle again is the wall time, and the time until the call returns is the host time. The second time,
a kernel keeps the device busy until the host has queued all work: the time between two events is
then pure device work, without launch gaps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

CYCLES = 2_000_000  # cycles per reading, 1 ms at full clock
WARM_S, GIVE_UP_S = 0.1, 1.0  # minimum and maximum duration of the calibration
MAX_DRIFT = 0.02  # relative change between two readings that agree
SHORTEST_SLEEP_MS = 0.2  # margin for a slower host


class Sample(NamedTuple):
    """Times of one call in milliseconds; on a CPU all three are equal.

    Attributes:
        wall_ms: Until the result was available.
        host_ms: Until the call returned.
        device_ms: Pure device work.
    """

    wall_ms: float
    host_ms: float
    device_ms: float

    @property
    def work_ms(self) -> float:
        """The time from which bandwidth is computed."""
        return self.device_ms


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._cycles_per_ms = self._calibrate()

    def sample(
        self,
        call: Callable[[], object],
        prepare: Callable[[], object] | None = None,
        *,
        repeat: int = 1,
    ) -> Sample:
        """Times one call.

        Args:
            call: The call to time.
            prepare: Runs untimed before each timed call (restores gradients, empties caches).
            repeat: Number of calls to average over, for calls of microseconds on a CPU.
        """
        if self.device.type != "cuda":
            if prepare:
                prepare()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            elapsed = (time.perf_counter() - start) * 1e3 / repeat
            return Sample(elapsed, elapsed, elapsed)
        return self._sample_cuda(call, prepare)

    def _calibrate(self) -> float:
        """Cycles that `torch.cuda._sleep` takes per millisecond.

        An idle card runs below its full clock, which would make later sleeps too short. The card is
        therefore kept busy until two readings agree.
        """
        start = time.perf_counter()
        self._cycles_in_ms(CYCLES)  # a warm-up call, which loads the kernel
        last, now = self._cycles_in_ms(CYCLES), self._cycles_in_ms(CYCLES)
        while (passed := time.perf_counter() - start) < WARM_S or abs(now / last - 1.0) > MAX_DRIFT:
            if passed > GIVE_UP_S:
                # the clock keeps changing; the larger reading is safe, as it makes sleeps longer
                break
            last, now = now, self._cycles_in_ms(CYCLES)
        return max(last, now)

    def _cycles_in_ms(self, cycles: int) -> float:
        before, after = self._events
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
        after.synchronize()
        return cycles / before.elapsed_time(after)

    def _sample_cuda(
        self, call: Callable[[], object], prepare: Callable[[], object] | None
    ) -> Sample:
        if prepare:
            prepare()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        wall = time.perf_counter() - start

        if prepare:
            prepare()
        # Sleeps for twice the measured host time, so that the host is done before the device
        # begins.
        torch.cuda._sleep(int(self._cycles_per_ms * max(host * 2e3, SHORTEST_SLEEP_MS)))
        before, after = self._events
        before.record()
        call()
        after.record()
        after.synchronize()
        return Sample(wall * 1e3, host * 1e3, before.elapsed_time(after))
