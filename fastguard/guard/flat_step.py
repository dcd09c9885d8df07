"""The road of `flat_parameters=True`: the wrapped optimizer steps over whole runs of parameters.

On a CPU the verdict is read first, which is free; on a GPU torch's fused kernel reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from fastguard.guard.flat_parameters import FlatParameters
from fastguard.guard.inner_step import InnerStep, StepCall
from fastguard.guard.on_device import OnDevice
from fastguard.guard.param_gradients import Gradients


class FlatStep(OnDevice):
    """As `OnDevice`, whatever the param groups say about `fused`.

    Args:
        optimizer: The wrapped one.
        gradients: Its gradients, which are flat.
    """

    def __init__(self, optimizer: Optimizer, gradients: Gradients) -> None:
        self._flat = FlatParameters(optimizer, gradients)
        super().__init__(optimizer, _FlatInnerStep(optimizer, self._flat))

    def fits(self) -> bool:
        """Always: the runs are updated by fused kernels in any case."""
        return True

    def reset(self) -> None:
        """There are other parameters now, or another state."""
        super().reset()
        self._flat.forget_state()

    def conclude(self, taken: bool) -> None:
        """What an interrupt has left of the end of an update is done now."""
        super().conclude(taken)
        self._flat.show_parameters()

    @property
    def waits(self) -> bool:
        """Whether every step reads the verdict."""
        return self._flat.on_host or super().waits


class _FlatInnerStep(InnerStep):
    """Calls the `step` of an optimizer while it sees runs in place of parameters."""

    def __init__(self, optimizer: Optimizer, flat: FlatParameters) -> None:
        super().__init__(optimizer)
        self._flat = flat

    def _step(self, call: StepCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        with self._flat.runs_in_place_of_parameters():
            super()._step(call, args, kwargs)
