"""`OptimizerWrapper`: a `torch.optim.Optimizer` that delegates to another optimizer.

Schedulers, scalers and trainers accept it. Param groups, state and defaults are looked up on the
wrapped optimizer at each access, because loading a state dict replaces them. Hooks belong to the
wrapper. All other attributes of the wrapped optimizer (`train` and `eval` of schedule-free ones,
`is_second_order`, `sync_lookahead`) are available on the wrapper, and so are special methods such
as `__len__`. Attributes that it lacks are missing there too, because training loops check with
`hasattr`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from inspect import isfunction
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastguard.errors.logger import log
from fastguard.guard.special_methods import adopt_special_methods
from fastguard.guard.state_dict import torch_dcp

# GradScaler sets these attributes on the wrapper. They are not delegated, because values on the
# wrapped optimizer would be mistaken for the scaler's.
_SCALER_ATTRIBUTES = frozenset({"grad_scale", "found_inf"})


class OptimizerWrapper(Optimizer):
    """An optimizer that takes param groups, state and defaults from `self.optimizer`."""

    optimizer: Optimizer
    _warned_of_other_step = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes subclasses that Lightning and Fabric create delegate their methods to the guard.

        Both frameworks create a subclass of the guard's class, and an instance of it that holds the
        guard as `optimizer`. The instance lacks the guard's attributes, so inherited methods would
        fail.
        """
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "optimizer", None), property):
            return
        for base in cls.__mro__[1:]:
            if issubclass(base, OptimizerWrapper):
                for name, method in vars(base).items():
                    if isfunction(method) and name[0] != "_" and getattr(cls, name) is method:
                        setattr(cls, name, _delegating(name))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The param groups of the wrapped optimizer, which replaces the list when loading."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # type: ignore[override]
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer."""
        # the attribute is missing while a guard is constructed
        gradients = self.__dict__.get("_gradients")
        torch_dcp.make_room(self.optimizer, None if gradients is None else gradients.flat)
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:  # type: ignore[override]
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the wrapped optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:  # type: ignore[override]
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the wrapped optimizer that the wrapper does not have."""
        # a property of the wrapper raised an error, which is raised again here
        if hasattr(type(self), name):
            return object.__getattribute__(self, name)
        # the attribute is missing while a copy is being made
        inner = self.__dict__.get("optimizer")
        if inner is None or not _is_delegated(name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            value = getattr(inner, name)
        except AttributeError as error:
            raise AttributeError(
                f"neither {type(self).__name__!r} nor the wrapped optimizer, "
                f"{type(inner).__name__!r}, has an attribute {name!r}"
            ) from error
        if getattr(value, "__self__", None) is inner and callable(value):
            return _returning(self, value)
        return self if value is inner else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name[0] == "_" or name in self.__dict__ or not self._belongs_to_wrapped(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or not self._belongs_to_wrapped(name):
            object.__delattr__(self, name)
        else:
            delattr(self.optimizer, name)

    def _belongs_to_wrapped(self, name: str) -> bool:
        """Whether the wrapped optimizer has an attribute that the wrapper lacks."""
        return (
            # the attribute exists once construction is complete
            "_warned_capturable_if_run_uncaptured" in self.__dict__
            and _is_delegated(name)
            and not hasattr(type(self), name)
            and hasattr(self.optimizer, name)
        )

    def __dir__(self) -> list[str]:
        delegated = filter(_is_delegated, dir(self.optimizer))
        return sorted({*super().__dir__(), *delegated})

    def _become_an_optimizer(self) -> None:
        """Does what Optimizer.__init__ does, except for creating param groups."""
        for event in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                setattr(self, f"_optimizer_{event}_{when}_hooks", OrderedDict())
        self._failed_step_hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()
        self._warned_capturable_if_run_uncaptured = True
        adopt_special_methods(self, self.optimizer)
        self._patch_step_function()

    def register_failed_step_hook(
        self, hook: Callable[[Optimizer, BaseException], None]
    ) -> RemovableHandle:
        """Registers `hook(optimizer, error)`, called after a step that raised an error.

        Post-hooks do not run after such a step.

        Returns:
            A handle to remove the hook.
        """
        handle = RemovableHandle(self._failed_step_hooks)
        self._failed_step_hooks[handle.id] = hook
        return handle

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, copies have no hooks. They also omit the `step` that a scheduler sets on the
        # instance: it is bound to this optimizer, so a copy would step the original.
        transient = (
            "step",
            "_opt_called",
            "grad_scale",
            "found_inf",
            "rank_watch",
            "_flight",
            "_scaler",
        )
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in transient and not name.endswith("_hooks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._become_an_optimizer()


def _delegating(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    method.__name__ = name
    return method


def _returning(around: OptimizerWrapper, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method of the wrapped optimizer so that it returns the wrapper instead of its `self`.

    Otherwise chained calls would continue on the unguarded optimizer. A method that changes the
    weights, such as `first_step`, also logs one warning, since the guard does not see that change.
    """
    steps = method.__name__.endswith("_step")

    @wraps(method)
    def delegated(*args: Any, **kwargs: Any) -> Any:
        checked = steps and not around._warned_of_other_step
        before = _versions(around) if checked else None
        result = method(*args, **kwargs)
        if checked and _versions(around) != before:
            around._warned_of_other_step = True
            log.warning(
                "%s.%s changes the weights outside of step, so the guard does not check these "
                "changes; call step(closure) instead",
                type(around.optimizer).__name__,
                method.__name__,
            )
        return around if result is around.optimizer else result

    return delegated


def _versions(optimizer: Optimizer) -> list[int]:
    return [p._version for group in optimizer.param_groups for p in group["params"]]


def _is_delegated(name: str) -> bool:
    return name not in _SCALER_ATTRIBUTES and not (name.startswith("__") and name.endswith("__"))
