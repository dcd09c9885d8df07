"""`OptimizerCopy`: a copy of everything that a step changes, to undo the step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.gradients.tensor_parts import copies_for_deepcopy

NUMBERS = (int, float, bool, NoneType)


class OptimizerCopy(NamedTuple):
    """Weights, states, settings and numbers of an optimizer and of optimizers inside it.

    With gradients, also the states of the random number generators of their devices, so that the
    step can be taken again.
    """

    weights: list[tuple[Tensor, Tensor]]
    states: list[tuple[Optimizer, dict[Any, Any]]]
    settings: list[tuple[dict[str, Any], dict[str, Any]]]
    numbers: list[tuple[Optimizer, dict[str, Any], frozenset[str]]]
    gradients: list[tuple[Tensor, Tensor | None, Tensor | None]]
    generators: list[tuple[torch.Generator, Tensor]]

    @staticmethod
    @torch.no_grad()
    def of(optimizer: Optimizer, *, gradients: bool = False) -> OptimizerCopy:
        """Copies weights and state, and the gradients if requested."""
        optimizers = list(with_inner(optimizer))
        groups = {id(g): g for each in optimizers for g in each.param_groups}.values()
        weights = {p: p.detach().clone() for g in groups for p in g["params"]}
        copies: dict[int, Any] = {}
        for each in optimizers:
            copies.update(copies_for_deepcopy(each.state))
        return OptimizerCopy(
            list(weights.items()),
            # Per parameter, because deepcopy of the whole state would copy its keys too.
            [(o, {p: copy.deepcopy(s, copies) for p, s in o.state.items()}) for o in optimizers],
            [(g, {k: _copied(v) for k, v in g.items() if k != "params"}) for g in groups],
            [
                (o, {k: v for k, v in vars(o).items() if type(v) in NUMBERS}, frozenset(vars(o)))
                for o in optimizers
            ],
            [
                (p, p.grad, None if p.grad is None else p.grad.detach().clone())
                for p in (weights if gradients else ())
            ],
            [(g, g.get_state()) for g in _generators(weights)] if gradients else [],
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Restores weights, state and settings bitwise; weights in place."""
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
                    group[key].copy_(value)  # a captured step reads this tensor
                else:
                    group[key] = value
        for optimizer, numbers, names in self.numbers:
            attributes = vars(optimizer)
            for name in attributes.keys() - names:  # created by the step
                if type(attributes[name]) in NUMBERS:
                    del attributes[name]
            attributes.update(numbers)
        for p, grad, values in self.gradients:
            p.grad = grad
            if grad is not None and values is not None:
                grad.copy_(values)
        for generator, state in self.generators:
            generator.set_state(state)


def with_inner(optimizer: Optimizer, seen: set[int] | None = None) -> Iterator[Optimizer]:
    """Yields an optimizer and those in its attributes and containers, such as the base of SAM."""
    seen = set() if seen is None else seen
    if id(optimizer) in seen:
        return
    seen.add(id(optimizer))
    yield optimizer
    for value in [*vars(optimizer).values()]:
        items = value.values() if isinstance(value, dict) else value
        for item in items if isinstance(value, dict | list | tuple) else (value,):
            if isinstance(item, Optimizer):
                yield from with_inner(item, seen)


def _generators(weights: Iterable[Tensor]) -> list[torch.Generator]:
    """Returns the default random number generators of the CPU and of the GPUs of some tensors."""
    gpus = {p.device.index for p in weights if p.is_cuda}
    return [torch.default_generator, *(torch.cuda.default_generators[i] for i in sorted(gpus))]


def _copied(setting: Any) -> Any:
    if not isinstance(setting, Tensor | list | dict):
        return setting
    return copy.deepcopy(setting, copies_for_deepcopy(setting))
