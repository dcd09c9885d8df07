"""The guard's part of a state dict: tensors and plain values, for `weights_only=True`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.gradients.transfer import numbers_on
from fastguard.guard import lifetime
from fastguard.guard.lifetime import NOTHING, Lifetime
from fastguard.stages.contract import N_COUNTERS, GuardState, Policy, fresh_limits

VERSION = 1
_OF_RULES = ("signals", "windows_of", "windows", "rings")


def save(state: GuardState, policy: Policy, taken_back: Lifetime = NOTHING) -> dict[str, Any]:
    """Counters and spike baselines, copied, and what they belong to.

    Without spike rules there are no entries about them: torch.distributed.checkpoint drops empty
    containers.
    """
    saved = {
        "version": VERSION,
        "counters": state.counters.clone(),
        lifetime.KEY: numbers_on(taken_back, state.counters.device, torch.int64),
    }
    if policy.adaptive is not None:
        saved["limit_of"] = type(policy.adaptive).__name__
        saved["limits"] = state.limits.clone()
    if not policy.rules:
        return saved
    return {
        **saved,
        "signals": list(policy.signals),
        "windows_of": _windows(policy),
        "windows": state.windows.clone(),
        "rings": state.rings.clone(),
    }


def load(saved: dict[str, Any] | None, policy: Policy, device: torch.device) -> GuardState:
    """The state to resume with.

    Raises:
        ValueError: `saved` is of a newer version, incomplete, damaged, or of other spike rules.
    """
    fresh = GuardState.fresh(policy, device)
    if saved is not None and not isinstance(saved, Mapping):
        raise ValueError(
            f"state_dict['fastguard'] is {saved!r}, not the guard's state; "
            "delete it to start a fresh guard"
        )
    if saved is None:
        warnings.warn(
            "the state dict has no 'fastguard' entry, so the optimizer resumes and the guard "
            "starts fresh: counters at 0, spike baselines empty. Save opt.state_dict() of the "
            "GuardedOptimizer to keep them.",
            stacklevel=4,
        )
        return fresh
    version = saved.get("version")
    if version != VERSION:
        raise ValueError(
            f"the guard's state has version {version!r}, this release reads {VERSION}; "
            "upgrade fastguard, or delete state_dict['fastguard'] to start a fresh guard"
        )
    has_rules = any(key in saved for key in _OF_RULES)
    needed = (*_OF_RULES, "counters") if has_rules else ("counters",)
    missing = [key for key in needed if key not in saved]
    if missing:
        raise ValueError(
            f"the guard's state lacks {', '.join(missing)}; it is damaged: "
            "delete state_dict['fastguard'] to start a fresh guard"
        )
    of = (_listed(saved.get("signals", [])), _listed(saved.get("windows_of", [])))
    if of != (list(policy.signals), _windows(policy)):
        raise ValueError(
            f"the guard's state is of spike rules {of[0]} with windows {of[1]}, but this guard has "
            f"{list(policy.signals)} with {_windows(policy)}; construct it with the same spike=, "
            "or delete state_dict['fastguard'] to start a fresh guard"
        )
    for name in ("counters", "windows", "rings") if has_rules else ("counters",):
        expected, given = getattr(fresh, name), saved[name]
        if name == "counters":
            given = _with_all_counters(given)
        given = _of_kind(name, given, expected)
        if has_numbers(given):
            _check_values(name, given, policy)
        expected.copy_(given)
    _load_limits(fresh, saved, policy)
    return fresh


def fit(state: GuardState, before: Policy, policy: Policy, device: torch.device) -> None:
    """Gives a state the numbers that the adaptive limit in force now needs.

    A rule of another kind begins fresh, as do segments that have come; else what was learned stays.
    """
    fresh = fresh_limits(policy, device)
    same_kind = type(before.adaptive) is type(policy.adaptive)
    if same_kind and state.limits.shape == fresh.shape:
        return
    if same_kind and state.limits.shape[0] == fresh.shape[0]:
        n = min(state.limits.shape[1], fresh.shape[1])
        fresh[:, :n] = state.limits[:, :n]
    state.limits = fresh


def _load_limits(fresh: GuardState, saved: Mapping[str, Any], policy: Policy) -> None:
    """The numbers of an adaptive limit."""
    rule = None if policy.adaptive is None else type(policy.adaptive).__name__
    if saved.get("limit_of") != rule:
        raise ValueError(
            f"the guard's state is of the adaptive limit {saved.get('limit_of')}, but this guard "
            f"has {rule}; construct it with the same max_norm=, or delete "
            "state_dict['fastguard'] to start a fresh guard"
        )
    if rule is None:
        return
    given = _of_kind("limits", saved.get("limits"), fresh.limits)
    if has_numbers(given) and bool(given.isnan().any()):
        raise ValueError(
            "the guard's state has limits=NaN; it is damaged: "
            "delete state_dict['fastguard'] to start a fresh guard"
        )
    fresh.limits.copy_(given)


def counter_of(state: GuardState, i: int) -> int:
    """One of `GuardState.counters`; 0 for a state of placeholders. Waits for a GPU."""
    return int(state.counters[i]) if has_numbers(state.counters) else 0


def _with_all_counters(given: object) -> object:
    """Counters of a state that was saved before skips for a loss scale were counted: none."""
    if isinstance(given, Tensor) and given.shape == (N_COUNTERS - 1,):
        return torch.cat([given, given.new_zeros(1)])
    return given


def _of_kind(name: str, given: object, expected: Tensor) -> Tensor:
    """What was saved, if it is a tensor of the expected shape and dtype."""
    shape = tuple(given.shape) if isinstance(given, Tensor) else None
    if not isinstance(given, Tensor) or shape != tuple(expected.shape):
        raise ValueError(
            f"the guard's state has {name} of shape {shape}, expected "
            f"{tuple(expected.shape)}; delete state_dict['fastguard'] to start a fresh guard"
        )
    if given.dtype != expected.dtype:
        raise ValueError(
            f"the guard's state has {name} of {given.dtype}, expected {expected.dtype}; "
            "delete state_dict['fastguard'] to start a fresh guard"
        )
    return given


def _check_values(name: str, given: Tensor, policy: Policy) -> None:
    """Raises a ValueError for numbers that no run leaves behind."""
    if name == "windows":
        sound = bool(given.isfinite().all())
    else:
        sound = bool((given >= 0).all())
    if name == "rings":
        for (filled, at, _), window in zip(given.tolist(), _windows(policy), strict=True):
            sound = sound and filled <= window and at < max(window, 1)
    if not sound:
        shown = "NaN or Inf" if name == "windows" else given.tolist()
        raise ValueError(
            f"the guard's state has {name}={shown}; it is damaged: "
            "delete state_dict['fastguard'] to start a fresh guard"
        )


def _listed(value: object) -> object:
    return list(value) if isinstance(value, list | tuple) else value


def _windows(policy: Policy) -> list[int]:
    return [rule.window for rule in policy.rules]
