"""`Kept`: everything that diagnosing moves, put back bit for bit."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.diagnosis.subject import Subject
from fastguard.provenance.replay import Untouched


class Kept:
    """The state before a diagnosis, to go back to as often as needed.

    Modules, their parameters and buffers and the random number generators are kept by `Untouched`;
    here come the gradients (the very tensors: nothing writes into them), the lists, dicts, sets and
    deques that modules carry, parameters that only the optimizer knows, and the optimizer.
    """

    def __init__(self, subject: Subject) -> None:
        modules = list(subject.modules)
        self._modules = Untouched(modules)
        self._containers = [
            (value, copy.copy(value))
            for module in modules
            for name, value in module.__dict__.items()
            # What nn.Module itself keeps there (parameters, hooks) is not written to.
            if type(value) in (list, dict, set, deque) and name not in _OWN
        ]
        known = set(subject.parameters.values())
        optimizer = subject.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        others = {p: None for g in groups for p in g["params"] if p not in known}
        self._others = [(p, p.detach().clone()) for p in others]
        self._gradients = [(p, p.grad) for p in (*known, *others)]
        self._optimizer = None if optimizer is None else _KeptOptimizer(optimizer)

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes everything since the start."""
        self._modules.restore()
        for container, before in self._containers:
            _refill(container, before)
        for parameter, before in self._others:
            parameter.copy_(before)
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        if self._optimizer is not None:
            self._optimizer.restore()


_OWN = frozenset(nn.Module().__dict__)


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, dict | set):
        container.clear()
        container.update(before)
    elif isinstance(container, list):
        container[:] = before
    else:
        container.clear()
        container.extend(before)


class _KeptOptimizer:
    """An optimizer's attributes, param groups and state; hooks and the objects stay the same."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._attributes = dict(optimizer.__dict__)
        self._state_table = optimizer.state
        self._groups = [(group, dict(group)) for group in optimizer.param_groups]
        self._lr = [
            (value, value.detach().clone())
            for group in optimizer.param_groups
            for value in group.values()
            if isinstance(value, Tensor)
        ]
        self._state = {
            key: (value, _entries(value) if isinstance(value, dict) else None)
            for key, value in optimizer.state.items()
        }

    def restore(self) -> None:
        self._optimizer.__dict__.clear()
        self._optimizer.__dict__.update(self._attributes)
        for group, before in self._groups:
            group.clear()
            group.update(before)
        for value, before in self._lr:
            value.copy_(before)
        self._state_table.clear()
        for key, (value, entries) in self._state.items():
            self._state_table[key] = value
            if entries is None:
                continue
            value.clear()
            for name, (thing, before) in entries.items():
                value[name] = _restored(thing, before)


def _entries(state: dict[Any, Any]) -> dict[Any, tuple[Any, Any]]:
    """Each entry of one parameter's state, and a copy of it."""
    return {
        name: (thing, thing.detach().clone() if isinstance(thing, Tensor) else copy.deepcopy(thing))
        for name, thing in state.items()
    }


def _restored(thing: Any, before: Any) -> Any:
    if isinstance(thing, Tensor):
        return thing.copy_(before)
    return copy.deepcopy(before)
