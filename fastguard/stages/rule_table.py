"""`RuleTable`: the spike rules of a policy as device tensors, for decisions on the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import lasting, watched
from fastguard.stages.spike_rules import GRAD_NORM, Rule


@dataclass(frozen=True, slots=True)
class RuleTable:
    """The K rules of a policy: one column `(K,)` per attribute, float64 unless noted."""

    sigma: Tensor
    warmup: Tensor
    window: Tensor  # int64; 0 for a fixed threshold
    fixed: Tensor  # the fixed threshold; inf for a sigma rule
    skips: Tensor  # bool
    clips: Tensor  # bool
    on_gradient: Tensor  # bool


def rule_table_of(
    rules: tuple[Rule, ...], signals: tuple[str, ...], device: torch.device
) -> RuleTable:
    """Returns the table of these rules, cached and therefore read-only."""
    return (
        _new_table(rules, signals, device) if watched() else _cached_table(rules, signals, device)
    )


@functools.lru_cache(maxsize=64)
def _cached_table(
    rules: tuple[Rule, ...], signals: tuple[str, ...], device: torch.device
) -> RuleTable:
    with lasting():
        return _new_table(rules, signals, device)


def _new_table(
    rules: tuple[Rule, ...], signals: tuple[str, ...], device: torch.device
) -> RuleTable:
    def column(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return RuleTable(
        sigma=column([r.sigma for r in rules]),
        warmup=column([r.warmup for r in rules]),
        window=column([r.window for r in rules], torch.int64),
        fixed=column([r.fixed for r in rules]),
        skips=column([r.action == "skip" for r in rules], torch.bool),
        clips=column([r.action == "clip" for r in rules], torch.bool),
        on_gradient=column([s == GRAD_NORM for s in signals], torch.bool),
    )
