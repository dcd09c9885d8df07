"""`UpdateStatistics`: what a step of a fused optimizer did to each weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.gradients.transfer import moved


class UpdateStatistics:
    """Norms of weights and of their updates in one step.

    `collecting_statistics` of an optimizer yields them. All norms use exact weights: float32
    masters if the optimizer keeps them. For DTensors, the values describe this rank's shards. Norms
    cover only finite elements. Reading an attribute launches a few operations on the device,
    without waiting.

    Attributes:
        parameters: The T parameters with a gradient, in arbitrary order. Empty before the first
            step, and after a skipped step on a CPU. On a GPU, all values of a skipped step are 0.
    """

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self._found: list[Tensor] = []

    @property
    def weight_norms(self) -> Tensor:
        """L2 norms of the weights before the step, float64 `(T,)`."""
        return self._column(0).sqrt()

    @property
    def update_norms(self) -> Tensor:
        """L2 norms of the differences between new and old weights, float64 `(T,)`."""
        return self._column(1).sqrt()

    @property
    def update_ratios(self) -> Tensor:
        """`update_norms / weight_norms`, float64 `(T,)`; NaN or infinite if the weights were 0."""
        return self.update_norms / self.weight_norms

    @property
    def nonfinite_counts(self) -> Tensor:
        """Numbers of NaN and infinite elements of the parameters after the step, int64 `(T,)`.

        A 16-bit parameter may be infinite though its float32 master is not.
        """
        return self._column(2).long()

    def _column(self, column: int) -> Tensor:
        if not self._found:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        device = self._found[0].device
        return torch.cat([moved(found[:, column], device) for found in self._found])

    def clear(self) -> None:
        """Forgets the previous step."""
        self.parameters, self._found = [], []

    def add(self, parameters: list[Tensor], found: Tensor) -> None:
        """Adds the parameters of one update, and its `Update.statistics`."""
        self.parameters += parameters
        self._found.append(found)
