"""Hooks that hold only a weak reference to their object."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle


def hook_weakly(
    register: Callable[[Callable[..., Any]], RemovableHandle], method: Callable[[], None]
) -> RemovableHandle:
    """Registers a bound method as a hook, which is removed when the method's object is collected.

    Args:
        register: A function that registers a hook, such as `optimizer.register_step_pre_hook`.
        method: A bound method, called without arguments.

    Returns:
        The handle, to remove the hook earlier.
    """
    reference = weakref.WeakMethod(method)

    def hook(*_: Any, **__: Any) -> None:
        if (found := reference()) is not None:
            found()

    handle = register(hook)
    owner = method.__self__  # type: ignore[attr-defined]
    weakref.finalize(owner, handle.remove).atexit = False
    return handle
