"""Step hooks: the guard's own run around a guarded step, those of all optimizers once a step.

`register_optimizer_step_pre_hook` and `..._post_hook` of torch register hooks for every optimizer.
The step of the wrapped one runs them. So the guard does not, but where it skips a step without that
call: a profiler that counts steps by them counts each once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def with_own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a method the `step` of an optimizer around another one, opaque to a compiler.

    As torch does it for every optimizer, but without the hooks of all optimizers.
    """

    def with_hooks(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        for hook in [*self._optimizer_step_pre_hooks.values()]:
            changed = hook(self, (self, *args), kwargs)
            if changed is not None:
                args, kwargs = _arguments(changed)
        result = step(self, *args, **kwargs)
        for hook in [*self._optimizer_step_post_hooks.values()]:
            hook(self, (self, *args), kwargs)
        return result

    @torch._disable_dynamo
    @functools.wraps(step)
    def hooked(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            if not torch.autograd._profiler_enabled():  # a range that nobody records takes 10 µs
                if not has_step_hooks(self):
                    return step(self, *args, **kwargs)
                return with_hooks(self, *args, **kwargs)
            name = f"Optimizer.step#{type(self).__name__}.step"
            with torch.autograd.profiler.record_function(name):
                return with_hooks(self, *args, **kwargs)
        except BaseException as error:
            self._after_failure(error)  # type: ignore[attr-defined]
            for hook in [*self._failed_step_hooks.values()]:  # type: ignore[attr-defined]
                hook(self, error)
            raise

    hooked.hooked = True  # type: ignore[attr-defined]  # or torch would put its own hooks around it
    return hooked


def _arguments(changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a pre-hook made of the arguments of `step`, without the optimizer itself."""
    if not (isinstance(changed, tuple) and len(changed) == 2):
        raise RuntimeError(
            f"a step pre-hook must return None or a tuple of (new_args, new_kwargs), but returned "
            f"{changed!r}"
        )
    args, kwargs = changed
    return tuple(args[1:]), kwargs


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer has step hooks of its own."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def is_hooked(optimizer: Optimizer) -> bool:
    """Whether any hook runs around the step of an optimizer, those of all optimizers included."""
    of_all = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    return has_step_hooks(optimizer) or bool(of_all)


def run_hooks_of_all(optimizer: Optimizer, *, pre: bool = True) -> None:
    """Runs the hooks of all optimizers, where no step of this one has run them.

    Args:
        optimizer: What they are called with.
        pre: Also those before a step, not only those behind it.
    """
    before: Mapping[int, Callable[..., Any]] = _global_optimizer_pre_hooks if pre else {}
    for hook in [*before.values(), *_global_optimizer_post_hooks.values()]:
        hook(optimizer, (optimizer,), {})


def has_post_hooks(optimizer: Optimizer) -> bool:
    """Whether hooks run behind the step of an optimizer. One without torch's constructor has no
    place for them.
    """
    own = getattr(optimizer, "_optimizer_step_post_hooks", None)
    return own is not None and bool(own or _global_optimizer_post_hooks)


@contextmanager
def told_of_the_step(optimizer: Optimizer, returned: list[Any]) -> Iterator[None]:
    """Adds None to `returned` when the step itself is over, ahead of all post-hooks: the weights
    have moved then, also if a hook raises.
    """
    handle = optimizer.register_step_post_hook(lambda *_: returned.append(None))
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_pre_hooks_of_all(optimizer: Optimizer) -> Iterator[None]:
    """Keeps the pre-hooks of all optimizers from this one; those inside it run them as ever."""
    hooks = _global_optimizer_pre_hooks
    kept = dict(hooks)

    def of_others(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda other, *args: None if other is optimizer else hook(other, *args)

    hooks.update({key: of_others(hook) for key, hook in kept.items()})
    try:
        yield
    finally:
        hooks.update({key: hook for key, hook in kept.items() if key in hooks})
