"""`FlatStep`: with `flat_parameters=True`, the optimizer steps over long runs of parameters.

On a CPU the verdict is read first, which costs nothing; on a GPU torch's fused kernel reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastguard.guard.flat_parameters import FlatParameters
from fastguard.guard.inner_step import InnerStep, StepCall
from fastguard.guard.on_device import OnDevice
from fastguard.guard.param_gradients import Gradients


class FlatStep(OnDevice):
    """Like `OnDevice`, but uses fused kernels regardless of `fused` in the param groups.

    Args:
        optimizer: The wrapped optimizer.
        gradients: The gradients of the optimizer, in flat buckets.
    """

    def __init__(self, optimizer: Optimizer, gradients: Gradients) -> None:
        self._flat = FlatParameters(optimizer, gradients)
        super().__init__(optimizer, _FlatInnerStep(optimizer, self._flat))

    def fits(self) -> bool:
        """Returns True: runs are always updated by fused kernels."""
        return True

    def reset(self) -> None:
        """Forgets the state of the runs, since parameters or state have changed."""
        super().reset()
        self._flat.forget_state()

    def conclude(self, taken: bool) -> None:
        """Puts the parameters back into the param groups if the update was interrupted."""
        super().conclude(taken)
        self._flat.show_parameters()

    def release(self) -> None:
        """Gives every parameter its own memory until the next step."""
        self._flat.release()

    def weights(self) -> list[Tensor] | None:
        """Returns the parameters in few tensors: see `FlatParameters.weights`."""
        return self._flat.weights()

    @property
    def reads_first(self) -> bool:
        """Whether every step reads the verdict first."""
        return self._flat.on_host or super().reads_first


class _FlatInnerStep(InnerStep):
    """Calls the `step` of an optimizer with runs in place of parameters."""

    def __init__(self, optimizer: Optimizer, flat: FlatParameters) -> None:
        super().__init__(optimizer)
        self._flat = flat

    def _step(self, call: StepCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._flat.call_with_runs(partial(super()._step, call, args, kwargs))
