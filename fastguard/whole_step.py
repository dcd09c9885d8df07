"""Optimizers that evaluate their closure several times within one step (LBFGS).

They move the weights between evaluations, so there is no moment before the step at which to decide.
The guard lets them step, looks at the gradients and the loss of the last evaluation, and takes the
whole step back, weights and state, if these are bad. Costs one copy of both a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.decide import Verdict


class WholeStep:
    """Steps first, decides afterwards, takes back if it must."""

    waits = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._weights: list[tuple[Tensor, Tensor]] = []
        self._state: dict[Any, Any] = {}

    @staticmethod
    def serves(optimizer: Optimizer) -> bool:
        return isinstance(optimizer, torch.optim.LBFGS)

    def attempt(self, closure: Callable[[], Any] | None) -> tuple[Any, Any]:
        """Steps the optimizer.

        Returns:
            What the optimizer's step returned, and the loss of the last evaluation.

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
            self._weights = [(p, p.detach().clone()) for g in groups for p in g["params"]]
            # By parameter: a copied parameter would be another key.
            self._state = {p: copy.deepcopy(s) for p, s in self.optimizer.state.items()}
        last = None

        def remember() -> Any:
            nonlocal last
            last = closure()
            return last

        return self.optimizer.step(remember), last

    def take_back(self) -> None:
        """Weights and state as they were before `attempt`, bit for bit."""
        with torch.no_grad():
            for p, weights in self._weights:
                p.copy_(weights)
        self.optimizer.state.clear()
        self.optimizer.state.update(self._state)
        self._forget()

    def step(self, verdict: Verdict) -> None:
        if verdict.found_inf.item() == 0.0:
            self._forget()
        else:
            self.take_back()

    def _forget(self) -> None:
        self._weights, self._state = [], {}
