"""Being a `torch.optim.Optimizer` to schedulers, scalers and trainers, around another one.

Param groups, state and defaults are those of the wrapped optimizer, looked up each time, because it
replaces these objects when it loads a state dict. Hooks are the wrapper's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from inspect import isfunction
from typing import Any

from torch.optim import Optimizer


class OptimizerAround(Optimizer):
    """An optimizer whose param groups, state and defaults are those of `self.optimizer`."""

    optimizer: Optimizer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lightning and Fabric wrap an optimizer in an instance of a class that they derive from
        its own, without its attributes: there, methods are to be those of the wrapped one.
        """
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "optimizer", None), property):
            return
        for base in cls.__mro__[1:]:
            if issubclass(base, OptimizerAround):
                for name, method in vars(base).items():
                    if isfunction(method) and name[0] != "_" and getattr(cls, name) is method:
                        setattr(cls, name, _of_the_wrapped(name))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The param groups of the wrapped optimizer, which replaces the list when it loads."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # type: ignore[override]
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:  # type: ignore[override]
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the wrapped optimizer."""
        return self.optimizer.defaults

    def _become_an_optimizer(self) -> None:
        """What Optimizer.__init__ does, without param groups of our own."""
        for event in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                setattr(self, f"_optimizer_{event}_{when}_hooks", OrderedDict())
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, copies carry no hooks; nor the `step` that a scheduler puts on the instance:
        # it holds this optimizer, and a copy would step the original.
        transient = ("step", "_opt_called", "grad_scale", "found_inf", "rank_watch")
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in transient and not name.endswith("_hooks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._become_an_optimizer()


def _of_the_wrapped(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    method.__name__ = name
    return method
