"""`SavableOptimizer`: state dicts of a guarded optimizer."""

from __future__ import annotations

from typing import Any

import torch

from fastguard.guard.lifetime import saved_with
from fastguard.guard.param_groups import GroupedOptimizer
from fastguard.guard.state_dict import guard_state, inner_state, parts, torch_dcp
from fastguard.records.losses import ObservedLosses
from fastguard.stages.contract import Policy


class SavableOptimizer(GroupedOptimizer):
    """An optimizer whose state dict contains the state of the guard."""

    _policy: Policy

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Returns the state dict of the wrapped optimizer, with the guard's state in `"fastguard"`.

        For `torch.distributed.checkpoint`, the first param group contains that state as well.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        guard = guard_state.save(self._state, self._policy, self._taken_back)
        if self._watch is not None and self._watch.has_state:
            self._recorder.wait()
            guard |= self._watch.state(self._state.counters.device)
        state_dict = parts.joined(self.optimizer.state_dict(), guard)
        if torch_dcp.is_calling():
            torch_dcp.embed(state_dict, self.optimizer)
        for hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of optimizer and guard, including counters and spike baselines.

        A state dict without `"fastguard"` resets the guard, with a warning. `lifetime` keeps counts
        that loading takes back.

        Args:
            state_dict: The result of `state_dict()`.

        Raises:
            TypeError, ValueError: The state dict belongs to another configuration; nothing was
                changed.
        """
        state_dict = parts.opened(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        wrapped, saved = parts.parts(state_dict, self.optimizer)
        guard = guard_state.load(saved, self._policy, self._device)
        taken_back = saved_with(saved)
        watched = None if self._watch is None else self._watch.state_in(saved)
        inner_state.load(self.optimizer, wrapped, self._check_param_groups)
        self._fitting_stepper().reset()
        self._observed = ObservedLosses()
        self._go_on_from(guard, taken_back)
        if self._watch is not None and watched is not None:
            self._watch.go_on_from(watched)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
