"""`"noise_scale"`: how many times as large the batch could be (arXiv 1812.06162, appendix A).

With n ranks and B / n samples per rank, unbiased estimates of the squared norm of the true gradient
and of the trace of the covariance are

    |G|^2 = (n |g_big|^2 - |g_small|^2) / (n - 1)        g_big: the mean over ranks
    tr(S) = (|g_small|^2 - |g_big|^2) B / (n - 1)        |g_small|^2: the mean over ranks

The record contains the simple noise scale tr(S) / |G|^2, divided by the batch size B. Below 1 the
batch is already large; at 8, a batch eight times as large would still use its samples efficiently.
Both estimates are noisy and are averaged separately, as the paper recommends, with a decay of 0.9
per watched step.

I/O: no extra reads, since `RankWatch` reads the gradients before they are reduced. The quantity
adds one number (8 bytes) to the vector that the ranks exchange.
"""

from __future__ import annotations

from typing import Any

import torch

from fastguard.gradients.transfer import moved
from fastguard.guard.watch.quantity import Reading, WatchedGradients
from fastguard.stages.contract import Known

DECAY = 0.9


class NoiseScale:
    """The noise scale, averaged over watched steps.

    Attributes:
        averages: The averages of |G|^2 and tr(S) / B, saved in the state dict.
    """

    def __init__(self) -> None:
        self.averages: tuple[float, float] = (0.0, 0.0)

    def read(self, step: WatchedGradients) -> Reading:
        """Reads the squared norm of this rank's gradient before the reduction, float64 `(1,)`.

        Raises:
            ValueError: There is no `RankWatch`.
        """
        assert step.sharing is not None
        if step.local_squared_norm is None:
            raise ValueError(
                "watch holds 'noise_scale', which needs the gradients of each rank before they "
                "are reduced; create a fastguard.RankWatch(opt, model) before the first backward "
                "pass"
            )
        n = step.sharing.team.size
        squared = step.local_squared_norm()
        if squared is None:  # no backward pass since the last step
            squared = torch.full((), float("nan"), dtype=torch.float64, device=step.device)
        squared = moved(squared, step.device)
        if step.scale is not None:
            scale = moved(step.scale.detach(), step.device).double()
            squared = squared / (scale * scale)

        def results(numbers: list[float], known: Known) -> dict[str, Any]:
            small, big = numbers[0] / n, known.total_norm**2
            if known.skipped or not 0.0 < small < float("inf"):  # true for NaN too
                return {}
            return self._averaged((n * big - small) / (n - 1), (small - big) / (n - 1))

        return Reading(squared.reshape(1), results, sums_over_ranks=True)

    def _averaged(self, signal: float, noise: float) -> dict[str, Any]:
        """Adds an estimate to the averages; returns the record, empty if not yet meaningful."""
        # both averages have the same bias toward 0, which cancels in their ratio
        before = self.averages
        signal = DECAY * before[0] + (1 - DECAY) * signal
        noise = DECAY * before[1] + (1 - DECAY) * noise
        self.averages = signal, noise
        if not (signal > 0.0 and noise >= 0.0):
            return {}
        return {"noise_scale": noise / signal}
