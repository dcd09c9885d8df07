"""Restores, bit for bit, the state of modules or all state that a diagnosis changes."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.checkpoints.random_state import random_state, set_random_state
from fastguard.diagnosis.replay.subject import Subject


class ModuleState:
    """Restores modules and random number generators bit for bit.

    Parameters and buffers are copied to host memory (one copy of the model). Attributes of modules,
    including training flags, are saved by reference: assignments in a forward pass are undone, but
    in-place changes to lists and dicts are not undone.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._attributes = [(m, _shallow(m.__dict__)) for m in modules]
        tensors = {t for m in modules for d in (m._parameters, m._buffers) for t in d.values()}
        self._tensors = [(t, t.detach().cpu().clone()) for t in tensors if t is not None]
        self._rng = random_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the state at construction."""
        for module, attributes in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(_shallow(attributes))
        for tensor, kept in self._tensors:
            if not _same_bits(tensor.detach().cpu(), kept):
                tensor.copy_(kept)
        set_random_state(self._rng)


_TABLES = ("_parameters", "_buffers", "_modules")


def _shallow(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Copies attributes, including the tables of parameters, buffers and modules.

    Tables of a scripted module cannot be copied, but a forward pass cannot replace their contents.
    """
    return {
        k: v.copy() if k in _TABLES and isinstance(v, dict) else v for k, v in attributes.items()
    }


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compares bits, so that NaN equals NaN."""
    bytes_of = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*bytes_of)


class State:
    """The state before a diagnosis, which can be restored repeatedly.

    `ModuleState` saves modules, their parameters and buffers, and random number generators. This
    class also saves lists, dicts, sets and deques in modules, parameters that are only in the
    optimizer, and the optimizer. Gradients are saved by reference, because nothing writes to them.
    """

    def __init__(self, subject: Subject) -> None:
        modules = list(subject.modules)
        self._modules = ModuleState(modules)
        self._containers = [
            (value, copy.copy(value))
            for module in modules
            for name, value in module.__dict__.items()
            # Nothing writes to the containers of nn.Module itself (parameters, hooks).
            if type(value) in (list, dict, set, deque) and name not in _OWN
        ]
        known = set(subject.parameters.values())
        optimizer = subject.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        others = {p: None for g in groups for p in g["params"] if p not in known}
        self._others = [(p, p.detach().clone()) for p in others]
        self._gradients = [(p, p.grad) for p in (*known, *others)]
        self._optimizer = None if optimizer is None else _OptimizerState(optimizer)

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the state at construction."""
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


class _OptimizerState:
    """An optimizer's attributes, param groups and state; hooks and objects are not replaced."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._attributes = dict(optimizer.__dict__)
        self._members = [(group, group["params"]) for group in optimizer.param_groups]
        self._settings = [
            {name: _keeper(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._state = optimizer.state
        self._entries = {key: _keeper(value) for key, value in optimizer.state.items()}

    def restore(self) -> None:
        self._optimizer.__dict__.clear()
        self._optimizer.__dict__.update(self._attributes)
        for (group, members), settings in zip(self._members, self._settings, strict=True):
            group.clear()
            group["params"] = members
            group.update((name, put_back()) for name, put_back in settings.items())
        self._state.clear()
        self._state.update((key, put_back()) for key, put_back in self._entries.items())


def _keeper(thing: Any) -> Callable[[], Any]:
    """Copies a value and returns a function that restores it and returns the same object."""
    if isinstance(thing, Tensor):
        values = thing.detach().clone()
        return lambda: thing.copy_(values)
    if isinstance(thing, list | tuple):
        items = [_keeper(item) for item in thing]

        def put_back() -> Any:
            before = [item() for item in items]
            if isinstance(thing, list):
                thing[:] = before
            return thing

        return put_back
    if isinstance(thing, dict):
        entries = {key: _keeper(value) for key, value in thing.items()}

        def refill() -> Any:
            before = {key: entry() for key, entry in entries.items()}
            thing.clear()
            thing.update(before)
            return thing

        return refill
    try:
        kept = copy.deepcopy(thing)
    except Exception:  # a process group or a stream, which steps do not change
        return lambda: thing
    return lambda: copy.deepcopy(kept)
