"""Optimizers that evaluate their closure themselves: LBFGS, SAM, closure forms of schedule-free.

They move the weights between or before evaluations, so there is no moment before the step at which
to decide. The guard lets them step, looks at the gradients and the loss of the last evaluation, and
takes the whole step back, weights and state, if these are bad. A non-finite loss ends the step
there and then: a line search fails on it with an IndexError. Costs one copy of weights and state a
step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.apply import apply
from fastguard.buckets import GradBuckets
from fastguard.decide import Verdict
from fastguard.inner_step import InnerStep, StepCall, StepSignature
from fastguard.losses import named_losses
from fastguard.step_hooks import run_hooks_of_all
from fastguard.tensor_parts import copies_for_deepcopy

NUMBERS = (int, float)


class _NonFiniteLoss(Exception):
    """Leaves the optimizer's step."""


class WholeStep:
    """Steps first, decides afterwards, takes back if it must."""

    waits = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._inner = InnerStep(optimizer)
        self._before: _Copy | None = None

    @staticmethod
    def serves(optimizer: Optimizer) -> bool:
        """Whether an optimizer says that it cannot step without its closure."""
        is_lbfgs = isinstance(optimizer, torch.optim.LBFGS)
        return is_lbfgs or StepSignature.of(optimizer).needs_closure

    def fits(self) -> bool:
        """An optimizer that evaluates its closure itself always does."""
        return True

    def reset(self) -> None:
        """Nothing is remembered of the parameters between steps."""

    def evaluate(self, call: StepCall, loss: Any, *, stop_at_nonfinite: bool) -> tuple[Any, Any]:
        """Steps the optimizer, which evaluates the closure.

        Args:
            call: The closure and what else `step` takes.
            loss: What the caller gave as the loss; None: that of the last evaluation.
            stop_at_nonfinite: The first non-finite loss is the last evaluation.

        Returns:
            What `step` returned, or the first loss if a non-finite one ended it; and the loss: the
            last one if it ended the step, whatever the caller gave.

        Raises:
            TypeError: There is no closure.
        """
        closure = call.closure
        if closure is None:
            raise TypeError(
                f"{type(self.optimizer).__name__}.step needs a closure that evaluates the model; "
                "pass step(closure)"
            )
        self._before = _Copy.of(self.optimizer)
        losses: list[Any] = []

        def remember() -> Any:
            given = closure()
            losses[1:] = [given]  # the first and the last
            if stop_at_nonfinite and _is_nonfinite(given):
                raise _NonFiniteLoss
            return given

        try:
            result = self._inner.with_closure(call, remember)
        except _NonFiniteLoss:
            run_hooks_of_all(self.optimizer, pre=False)
            return losses[0], losses[-1]
        last = losses[-1] if losses else None
        return result, last if loss is None else loss

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Keeps the step, or takes it back. Nothing of it is clipped any more."""
        if changes:
            apply(buckets, verdict)
        if verdict.found_inf.item() != 0.0 and self._before is not None:
            self._before.restore()

    def conclude(self, taken: bool) -> None:
        """Weights and state as they were before `evaluate`, bit for bit, unless it was decided."""
        if self._before is not None and not taken:
            self._before.restore()
        self._before = None


class _Copy(NamedTuple):
    """Weights, states, settings and numbers of an optimizer, and of those that it holds itself."""

    weights: list[tuple[Tensor, Tensor]]
    states: list[tuple[Optimizer, dict[Any, Any]]]
    settings: list[tuple[dict[str, Any], dict[str, Any]]]
    numbers: list[tuple[Optimizer, dict[str, Any]]]

    @staticmethod
    @torch.no_grad()
    def of(optimizer: Optimizer) -> _Copy:
        optimizers = list(_with_inner(optimizer, set()))
        groups = {id(g): g for each in optimizers for g in each.param_groups}.values()
        weights = {p: p.detach().clone() for g in groups for p in g["params"]}
        copies: dict[int, Any] = {}
        for each in optimizers:
            copies.update(copies_for_deepcopy(each.state))
        return _Copy(
            list(weights.items()),
            # By parameter: a copied parameter would be another key.
            [(o, {p: copy.deepcopy(s, copies) for p, s in o.state.items()}) for o in optimizers],
            [(g, {k: _copied(v) for k, v in g.items() if k != "params"}) for g in groups],
            [
                (o, {k: v for k, v in vars(o).items() if type(v) in (int, float)})
                for o in optimizers
            ],
        )

    @torch.no_grad()
    def restore(self) -> None:
        for p, values in self.weights:
            p.copy_(values)
        for optimizer, state in self.states:
            optimizer.state.clear()
            optimizer.state.update(state)
        for group, settings in self.settings:
            for key in [k for k in group if k != "params" and k not in settings]:
                del group[key]
            for key, value in settings.items():
                if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                    group[key].copy_(value)  # a captured step reads this very tensor
                else:
                    group[key] = value
        for optimizer, numbers in self.numbers:
            vars(optimizer).update(numbers)


def _with_inner(optimizer: Optimizer, seen: set[int]) -> Iterator[Optimizer]:
    """An optimizer and those among its attributes, such as the base optimizer of SAM."""
    if id(optimizer) in seen:
        return
    seen.add(id(optimizer))
    yield optimizer
    for value in [*vars(optimizer).values()]:
        if isinstance(value, Optimizer):
            yield from _with_inner(value, seen)


def _copied(setting: Any) -> Any:
    return copy.deepcopy(setting) if isinstance(setting, Tensor | list | dict) else setting


def _is_nonfinite(loss: Any) -> bool:
    return any(not torch.as_tensor(x).isfinite().all() for x in named_losses(loss).values())
