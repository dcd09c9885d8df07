"""`"noise_scale"`: how many times larger the batch could be (arXiv 1812.06162, appendix A).

With n ranks and batches of B / n samples each, unbiased estimates of the squared true gradient and
of the trace of its covariance are

    |G|^2 = (n |g_big|^2 - |g_small|^2) / (n - 1)        g_big: the mean over ranks
    tr(S) = (|g_small|^2 - |g_big|^2) B / (n - 1)        |g_small|^2: the mean over ranks

and the simple noise scale tr(S) / |G|^2 in units of the batch B is what the record tells: below 1
the batch is large already, at 8 one of eight times the size would still use its samples well. Both
estimates are noisy and are averaged apart, as the paper advises, with a decay of 0.9 per watched
step.

I/O: none of its own; `RankWatch` reads the gradients before they are reduced. One number, 8 bytes,
in the ranks' exchange.
"""

from __future__ import annotations

from typing import Any

import torch

from fastguard.gradients.transfer import moved
from fastguard.guard.watch.quantity import Reading, WatchedGradients
from fastguard.stages.contract import Known

DECAY = 0.9


class NoiseScale:
    """Averages over watched steps; a new process begins anew."""

    def __init__(self) -> None:
        self._signal = self._noise = self._weight = 0.0

    def read(self, step: WatchedGradients) -> Reading:
        """float64 `(1,)`: the squared norm of this rank's own gradient.

        Raises:
            ValueError: Nothing has seen the gradients before they were reduced.
        """
        assert step.sharing is not None
        if step.local_squared_norm is None:
            raise ValueError(
                "watch holds 'noise_scale', which needs each rank's own gradient, and those that "
                "the optimizer gets are reduced already; make a fastguard.RankWatch(opt, model) "
                "before the first backward pass"
            )
        n = step.sharing.team.size
        squared = step.local_squared_norm()
        if squared is None:  # without a backward pass there is nothing to tell
            squared = torch.full((), float("nan"), dtype=torch.float64, device=step.device)
        squared = moved(squared, step.device)
        if step.scale is not None:
            scale = moved(step.scale.detach(), step.device).double()
            squared = squared / (scale * scale)

        def tell(numbers: list[float], known: Known) -> dict[str, Any]:
            small, big = numbers[0] / n, known.total_norm**2
            if known.skipped or not 0.0 < small < float("inf"):  # NaN too
                return {}
            return self._averaged((n * big - small) / (n - 1), (small - big) / (n - 1))

        return Reading(squared.reshape(1), tell, sums_over_ranks=True)

    def _averaged(self, signal: float, noise: float) -> dict[str, Any]:
        """The averages with one more estimate; nothing while they make no sense."""
        self._signal = DECAY * self._signal + (1 - DECAY) * signal
        self._noise = DECAY * self._noise + (1 - DECAY) * noise
        self._weight = DECAY * self._weight + (1 - DECAY)
        if not (self._signal > 0.0 and self._noise >= 0.0):
            return {}
        return {"noise_scale": self._noise / self._signal}
