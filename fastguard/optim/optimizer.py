"""`FusedOptimizer`, the base class of all fused optimizers; a subclass adds its hyper-parameters.

A step sorts parameters into buckets with the same device, dtypes and options, creates an `Update`
for each, and passes it to the backend of the device. The verdict comes from the guard (`obeying`)
or from a `GradScaler`, and is applied within the update: gradients are never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from fastguard.gradients.buckets import name_of
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.optim import state_dict as states
from fastguard.optim.backend import updater_of
from fastguard.optim.contract import STATES, Algorithm
from fastguard.optim.options import OF_ADAMW, OF_TORCH, OWN, check_group, refuse_unknown
from fastguard.optim.orders import Orders
from fastguard.optim.sort import check_gradients, updates_of
from fastguard.optim.statistics import UpdateStatistics
from fastguard.stages.agc import UnitSummary


class FusedOptimizer(Optimizer):
    """An optimizer that applies a verdict in the same pass that updates the weights.

    Args:
        params: Parameters, `(name, parameter)` pairs or param groups, as in torch.
        defaults: The hyper-parameters of the algorithm.
        own: All other keyword arguments: settings named in `own_settings`, and unknown arguments.

    Raises:
        TypeError, ValueError: An argument or a parameter is not supported.
    """

    algorithm: ClassVar[Algorithm]
    own_settings: ClassVar[Mapping[str, Any]] = OWN
    _step_supports_amp_scaling = True  # makes GradScaler set found_inf and grad_scale
    _orders: Orders | None = None
    _collected: tuple[UpdateStatistics, ...] = ()

    def __init__(self, params: Any, defaults: dict[str, Any], own: dict[str, Any]) -> None:
        known = self.own_settings
        unknown = [key for key in own if key not in known]
        refuse_unknown(type(self).__name__, unknown, [*defaults, *known])
        super().__init__(params, {**defaults, **OF_TORCH, **known, **own})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group.

        Raises:
            TypeError, ValueError: The group is not supported; it was not added.
        """
        super().add_param_group(param_group)
        try:
            self.check_groups(self.param_groups[-1:], len(self.param_groups) - 1)
        except Exception:
            del self.param_groups[-1]
            raise

    def check_groups(self, groups: Sequence[Mapping[str, Any]], first: int = 0) -> None:
        """Raises a TypeError or ValueError for param groups that are not supported."""
        for g, group in enumerate(groups, first):
            unknown = [k for k in OF_ADAMW if k not in self.own_settings and group.get(k)]
            refuse_unknown(type(self).__name__, unknown, self.own_settings)
            names = group.get("param_names") or [
                f"parameter {i} of param group {g}" for i in range(len(group["params"]))
            ]
            check_group(group, [name_of(i, names) for i in range(len(names))])

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler and triton
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step, unless the verdict is to skip it.

        Args:
            closure: Reevaluates the model and returns the loss, as in torch. Default: None.

        Returns:
            The loss that the closure returned, or None without a closure.

        Raises:
            TypeError: A gradient is sparse or complex; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for statistics in self._collected:
            statistics.clear()
        check_gradients(self)
        orders = self._orders or self._orders_of_scaler()
        found_inf = orders.found_inf
        if found_inf.device.type == "cpu" and has_numbers(found_inf) and found_inf.item() != 0.0:
            return loss
        for update in updates_of(self, orders, self._collected):
            values = updater_of(update)(update)
            if orders.units is not None and values is not None:
                summary = UnitSummary(values, update.positions, update.unit_counts)
                orders.units.clipped.append(summary)
        return loss

    @contextmanager
    def obeying(self, orders: Orders) -> Iterator[None]:
        """Context in which steps apply these orders."""
        self._orders = orders
        try:
            yield
        finally:
            self._orders = None

    def _orders_of_scaler(self) -> Orders:
        groups = self.param_groups
        device = next((p.device for g in groups for p in g["params"]), torch.device("cpu"))
        return Orders.of_scaler(
            getattr(self, "grad_scale", None), getattr(self, "found_inf", None), device
        )

    @contextmanager
    def collecting_statistics(
        self, into: UpdateStatistics | None = None
    ) -> Iterator[UpdateStatistics]:
        """Context in which each step also computes statistics of its update.

        No other result of a step changes by a single bit.

        Args:
            into: Receives the statistics; default: a new `UpdateStatistics`.

        Yields:
            Norms of the weights and of their updates, and counts of non-finite weights, of the
            latest step in the block.

        Example:
            >>> import torch, fastguard.optim
            >>> weight = torch.nn.Parameter(torch.full((4,), 2.0))
            >>> weight.grad = torch.ones(4)
            >>> optimizer = fastguard.optim.SGD([weight], lr=0.5)
            >>> with optimizer.collecting_statistics() as statistics:
            ...     optimizer.step()
            >>> statistics.weight_norms.tolist(), statistics.update_ratios.tolist()
            ([4.0], [0.25])
        """
        statistics = UpdateStatistics() if into is None else into
        self._collected = (*self._collected, statistics)
        try:
            yield statistics
        finally:
            self._collected = tuple(one for one in self._collected if one is not statistics)

    # Subclasses override these methods.

    def hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Returns hyper-parameters by their names in `contract.HYPER`; missing ones are 0."""
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": group.get("eps", 0.0),
            "weight_decay": group["weight_decay"],
            "spike_threshold": group.get("spike_threshold") or 0.0,
            "momentum_reset": group.get("momentum_reset") or 0.0,
            "reset_warmup": group.get("reset_warmup") or 0.0,
        }

    def state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of the state tensors of the parameters of a group."""
        names = STATES[self.algorithm]
        return names if group.get("amsgrad") else names[:2]

    def counts_steps(self, group: Mapping[str, Any]) -> bool:
        """Whether the update depends on the number of steps a parameter has taken."""
        return True

    # State dicts.

    def state_dict(self) -> dict[str, Any]:
        """Returns the state dict, as torch's optimizers do.

        Where a process group is initialized, remainders are int32 instead of int16.
        """
        return states.transferable(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, or of torch's optimizer of the same name.

        Every entry gets the dtype that this optimizer uses for the entry, while torch would cast
        all entries to the dtype of the parameter.

        Args:
            state_dict: The state dict.

        Raises:
            ValueError: The state dict was saved with another `master`, or does not fit; nothing was
                changed.
        """
        states.check_modes(self, state_dict)
        seen: list[Mapping[str, Any]] = []
        hook = self.register_load_state_dict_pre_hook(lambda _, adapted: seen.append(adapted))
        state, groups = self.state, self.param_groups
        try:
            super().load_state_dict(state_dict)
            states.take_over(self, seen[-1], groups)
            self.check_groups(self.param_groups)
        except BaseException:
            self.__dict__.update(state=state, param_groups=groups)
            raise
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
