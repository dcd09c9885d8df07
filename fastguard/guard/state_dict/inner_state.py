"""Loads the wrapped optimizer's part of a state dict, exactly as saved or not at all.

The optimizer's own `load_state_dict` does the loading. However, the method of torch accepts the
state of another optimizer, changes the optimizer before it detects an error, and casts state to the
parameter's dtype. This module therefore adds a check, undoes a failed load, and reverts casts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastguard.guard.state_dict import uncastable
from fastguard.guard.state_dict.casts import take_back_casts
from fastguard.guard.state_dict.misfit import misfit
from fastguard.guard.state_dict.parts import saves_as_torch


def load(optimizer: Optimizer, state_dict: Any, check: Callable[[], None]) -> None:
    """Loads the state of the wrapped optimizer, bitwise equal to the saved one.

    Args:
        optimizer: The wrapped optimizer.
        state_dict: The state dict to load; not changed.
        check: Raises an error if the param groups after loading cannot be guarded.

    Raises:
        ValueError: The state dict belongs to another optimizer or model; nothing was changed.
    """
    name = type(optimizer).__name__
    before = _Attributes(optimizer)
    live, groups = optimizer.state, optimizer.param_groups
    seen_by_torch: list[dict[str, Any]] = []
    hooks: list[RemovableHandle] = []

    def hide(_: Optimizer, adapted: dict[str, Any]) -> dict[str, Any]:
        seen_by_torch.append(adapted)
        return uncastable.hide(adapted)

    # Optimizers that never called Optimizer.__init__ have no hooks and load differently.
    if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
        # Our hooks run after the optimizer's own pre-hooks, and before its post-hooks.
        hooks.append(optimizer.register_load_state_dict_pre_hook(hide))
        hooks.append(optimizer.register_load_state_dict_post_hook(uncastable.reveal, prepend=True))

    def wrong() -> str | None:
        return misfit(optimizer, live, groups) if saves_as_torch(optimizer) else None

    loaded = False
    try:
        try:
            optimizer.load_state_dict(_shallow(state_dict))
        # torch's messages do not help users
        except (LookupError, TypeError, AttributeError) as error:
            why = (
                f"{name} cannot load this state dict: {error!r}; load a state dict that {name} "
                "saved"
            )
            raise ValueError(wrong() or why) from error
        if (reason := wrong()) is not None:
            raise ValueError(reason)
        if seen_by_torch:
            take_back_casts(optimizer, seen_by_torch[-1], live)
        check()
        loaded = True
    finally:
        for hook in hooks:
            hook.remove()
        if not loaded:
            before.put_back()


class _Attributes:
    """The attributes of an optimizer and of optimizers inside it, for undoing a load.

    Keeps references to objects, and the items of containers. That is sufficient, because loading
    replaces tensors and containers or fills containers, but never writes into a tensor.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._remember(optimizer)

    def _remember(self, value: Any) -> None:
        container = vars(value) if isinstance(value, Optimizer) else value
        if isinstance(container, tuple):
            for item in container:
                self._remember(item)
        if not isinstance(container, dict | list) or id(container) in self._contents:
            return
        items = dict(container) if isinstance(container, dict) else list(container)
        self._contents[id(container)] = container, items
        for item in items.values() if isinstance(items, dict) else items:
            self._remember(item)

    def put_back(self) -> None:
        for container, items in self._contents.values():
            container.clear()
            container.extend(items) if isinstance(items, list) else container.update(items)


def _shallow(state_dict: Any) -> Any:
    """Returns a copy with its own `state`, since ZeroRedundancyOptimizer empties that dict."""
    if not isinstance(state_dict, dict) or not isinstance(state_dict.get("state"), dict):
        return state_dict
    return {**state_dict, "state": dict(state_dict["state"])}
