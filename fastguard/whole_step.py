"""Optimizers that evaluate their closure several times within one step (LBFGS).

They move the weights between evaluations, so there is no moment before the step at which to decide.
The guard lets them step, looks at the gradients and the loss of the last evaluation, and takes the
whole step back, weights and state, if these are bad. A non-finite loss ends the step there and
then: the line search fails on it with an IndexError. Costs one copy of weights and state a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.decide import Verdict
from fastguard.tensor_parts import copies_for_deepcopy


class _NonFiniteLoss(Exception):
    """Leaves the optimizer's step."""


class WholeStep:
    """Steps first, decides afterwards, takes back if it must."""

    waits = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._before: tuple[list[tuple[Tensor, Tensor]], dict[Any, Any]] | None = None

    @staticmethod
    def serves(optimizer: Optimizer) -> bool:
        return isinstance(optimizer, torch.optim.LBFGS)

    def attempt(
        self, closure: Callable[[], Any] | None, *, stop_at_nonfinite: bool
    ) -> tuple[Any, Any, bool]:
        """Steps the optimizer. If anything raises, the step is taken back.

        Args:
            closure: Evaluates the model and returns the loss.
            stop_at_nonfinite: The first non-finite loss is the last evaluation.

        Returns:
            The losses of the first and of the last evaluation, and whether that one ended the step.

        Raises:
            TypeError: There is no closure.
        """
        if closure is None:
            raise TypeError(
                f"{type(self.optimizer).__name__}.step needs a closure that evaluates the model; "
                "pass step(closure)"
            )
        with torch.no_grad():
            groups = self.optimizer.param_groups
            weights = [(p, p.detach().clone()) for g in groups for p in g["params"]]
            # By parameter: a copied parameter would be another key.
            copies = copies_for_deepcopy(self.optimizer.state)
            state = {p: copy.deepcopy(s, copies) for p, s in self.optimizer.state.items()}
        self._before = weights, state
        losses: list[Any] = []

        def remember() -> Any:
            loss = closure()
            losses[1:] = [loss]  # the first and the last
            if stop_at_nonfinite and not torch.as_tensor(loss).detach().isfinite().all():
                raise _NonFiniteLoss
            return loss

        stopped = False
        try:
            self.optimizer.step(remember)
        except _NonFiniteLoss:
            stopped = True
        except BaseException:
            self.take_back()
            raise
        return losses[0], losses[-1], stopped

    def take_back(self) -> None:
        """Weights and state as they were before `attempt`, bit for bit; no decided step is."""
        if self._before is None:
            return
        weights, state = self._before
        with torch.no_grad():
            for p, values in weights:
                p.copy_(values)
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        self._before = None

    def step(self, verdict: Verdict) -> None:
        if verdict.found_inf.item() == 0.0:
            self._before = None
        else:
            self.take_back()
