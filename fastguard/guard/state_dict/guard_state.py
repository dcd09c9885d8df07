"""Saves and loads the guard's part of a state dict: tensors and plain values (`weights_only`)."""

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
_RULE_ENTRIES = ("signals", "windows_of", "windows", "rings")


def save(state: GuardState, policy: Policy, taken_back: Lifetime = NOTHING) -> dict[str, Any]:
    """Returns a copy of counters, baselines and adaptive limits, with the settings they belong to.

    If there are no spike rules, the entries for them are omitted, because
    torch.distributed.checkpoint drops empty containers.
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
    """Returns the saved state; a new one, with a warning, if `saved` is None.

    Raises:
        ValueError: `saved` has another version, is incomplete or damaged, or belongs to other spike
            rules or limits.
    """
    fresh = GuardState.fresh(policy, device)
    if saved is not None and not isinstance(saved, Mapping):
        raise ValueError(
            f"state_dict['fastguard'] is {saved!r}, but must be a dict; delete the entry to start "
            "with a new guard"
        )
    if saved is None:
        warnings.warn(
            "the state dict has no 'fastguard' entry, so the optimizer is restored, but the guard "
            "starts with counters at 0 and empty spike baselines. Save opt.state_dict() of the "
            "GuardedOptimizer to keep them.",
            stacklevel=4,
        )
        return fresh
    version = saved.get("version")
    if version != VERSION:
        raise ValueError(
            f"state_dict['fastguard'] has version {version!r}, but this release reads {VERSION}; "
            "upgrade fastguard, or delete the entry to start with a new guard"
        )
    has_rules = any(key in saved for key in _RULE_ENTRIES)
    needed = (*_RULE_ENTRIES, "counters") if has_rules else ("counters",)
    missing = [key for key in needed if key not in saved]
    if missing:
        raise ValueError(
            f"state_dict['fastguard'] lacks {', '.join(missing)}, so it is damaged; delete the "
            "entry to start with a new guard"
        )
    of = (_listed(saved.get("signals", [])), _listed(saved.get("windows_of", [])))
    if of != (list(policy.signals), _windows(policy)):
        raise ValueError(
            f"state_dict['fastguard'] belongs to spike rules {of[0]} with windows {of[1]}, but "
            f"this guard has {list(policy.signals)} with {_windows(policy)}; construct the guard "
            "with the same spike=, or delete the entry to start with a new guard"
        )
    for name in ("counters", "windows", "rings") if has_rules else ("counters",):
        expected, given = getattr(fresh, name), saved[name]
        if name == "counters":
            given = _with_all_counters(given)
        given = _checked(name, given, expected)
        if has_numbers(given):
            _check_values(name, given, policy)
        expected.copy_(given)
    _load_limits(fresh, saved, policy)
    return fresh


def fit(state: GuardState, before: Policy, policy: Policy, device: torch.device) -> None:
    """Adapts the state of adaptive limits to a changed policy.

    The numbers that a rule has learned are reset if the new rule has another class, or stores
    another count of numbers per segment. Otherwise existing segments keep their numbers, and new
    segments start with initial values.
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
    """Loads the numbers of an adaptive limit into a new state."""
    rule = None if policy.adaptive is None else type(policy.adaptive).__name__
    if saved.get("limit_of") != rule:
        raise ValueError(
            f"state_dict['fastguard'] belongs to the adaptive limit {saved.get('limit_of')}, but "
            f"this guard has {rule}; construct the guard with the same max_norm=, or delete the "
            "entry to start with a new guard"
        )
    if rule is None:
        return
    given = _checked("limits", saved.get("limits"), fresh.limits)
    if has_numbers(given) and bool(given.isnan().any()):
        raise ValueError(
            "state_dict['fastguard'] has limits=NaN, so it is damaged; delete the entry to start "
            "with a new guard"
        )
    fresh.limits.copy_(given)


def counter_of(state: GuardState, i: int) -> int:
    """Returns one of `GuardState.counters`; 0 for placeholders. Waits for a GPU."""
    return int(state.counters[i]) if has_numbers(state.counters) else 0


def _with_all_counters(given: object) -> object:
    """Appends a 0 to counters saved by a release that did not count loss-scale skips."""
    if isinstance(given, Tensor) and given.shape == (N_COUNTERS - 1,):
        return torch.cat([given, given.new_zeros(1)])
    return given


def _checked(name: str, given: object, expected: Tensor) -> Tensor:
    """Returns a saved tensor; raises a ValueError unless it has the expected shape and dtype."""
    shape = tuple(given.shape) if isinstance(given, Tensor) else None
    if not isinstance(given, Tensor) or shape != tuple(expected.shape):
        raise ValueError(
            f"state_dict['fastguard'] has {name} of shape {shape}, expected "
            f"{tuple(expected.shape)}; delete the entry to start with a new guard"
        )
    if given.dtype != expected.dtype:
        raise ValueError(
            f"state_dict['fastguard'] has {name} of {given.dtype}, expected {expected.dtype}; "
            "delete the entry to start with a new guard"
        )
    return given


def _check_values(name: str, given: Tensor, policy: Policy) -> None:
    """Raises a ValueError for numbers that a run cannot produce."""
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
            f"state_dict['fastguard'] has {name}={shown}, so it is damaged; delete the entry to "
            "start with a new guard"
        )


def _listed(value: object) -> object:
    return list(value) if isinstance(value, list | tuple) else value


def _windows(policy: Policy) -> list[int]:
    return [rule.window for rule in policy.rules]
