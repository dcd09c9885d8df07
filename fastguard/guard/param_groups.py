"""`GroupedOptimizer`: adds and checks the param groups of a guarded optimizer."""

from __future__ import annotations

from typing import Any

from fastguard.guard.arguments import check_settings, named_parameters_of
from fastguard.guard.clip_scope import limits
from fastguard.guard.flat_checks import check_flat_dtypes
from fastguard.guard.reporting import ReportingOptimizer


class GroupedOptimizer(ReportingOptimizer):
    """An optimizer that guards param groups which are added or loaded later."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group to the wrapped optimizer; it is guarded from the next step on.

        Args:
            param_group: As in torch, plus `max_norm` and `clip_value`.

        Raises:
            TypeError, ValueError: The group cannot be guarded; it was not added.
        """
        named = named_parameters_of(param_group)
        limits([*self.param_groups, param_group], self.clip_scope, self.max_norm)
        check_settings(param_group, [p for _, p in named])
        self._gradients.check_new(named)
        if self._gradients.with_parameters:
            check_flat_dtypes(self.optimizer, [p for _, p in named])
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; with flat buckets one fill per buffer sets them to zero.

        Args:
            set_to_none: As in torch; ignored with flat buckets.
        """
        self._gradients.zero_(set_to_none)

    def _check_param_groups(self) -> None:
        """Raises a TypeError or ValueError for loaded groups that cannot be guarded."""
        limits(self.param_groups, self.clip_scope, self.max_norm)
        for group in self.param_groups:
            check_settings(group, group["params"])
