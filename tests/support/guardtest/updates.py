"""Updates of `fastguard.optim`, for comparing two backends."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastguard.gradients.unit_buckets import n_units
from fastguard.optim import bits
from fastguard.optim.contract import HYPER, STATES, Update
from fastguard.stages.agc import ClippedUnits, UnitLimits, UnitSummary

SHAPES = [(7,), (33, 65), (), (0,), (2, 3, 4, 5), (40_001,), (300_007,)]
# Settings of `random_update` that every backend is tested with.
STORED: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp64": dict(dtype=torch.float64),
    "bf16": dict(dtype=torch.bfloat16),
    "master": dict(dtype=torch.bfloat16, state_dtype=torch.float32, master="float32"),
    "remainder": dict(dtype=torch.bfloat16, state_dtype=torch.float32, master="remainder"),
    "stochastic": dict(dtype=torch.bfloat16, rounding="stochastic"),
    "strided": dict(strided=True),
}
GROUPS = [0, 1, 0, 1, 0, 1, 0]
SEGMENTS = [0, 1, 1, 0, 0, 1, 0]


def hyper_rows(algorithm: str, **values: float) -> Tensor:
    """Returns two param groups with different hyper-parameters."""
    first = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, momentum=0.9)
    second = dict(lr=3e-2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.0, momentum=0.5)
    rows = []
    for row in (first, second):
        named = {name: 0.0 for name in HYPER} | {"sign": 1.0, "seed": 7.0} | row | values
        rows.append([named[name] for name in HYPER])
    return torch.tensor(rows, dtype=torch.float64)


def random_update(
    algorithm: Any,
    *,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    strided: bool = False,
    counted: bool = True,
    master: Any = None,
    seed: int = 0,
    first_step: int = 0,
    hyper: dict[str, float] | None = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **options: Any,
) -> Update:
    """Returns an update from the middle of a run, whose tensors have taken 1 to 7 steps.

    Args:
        first_step: Number of steps that every tensor has taken in addition.
        shapes: At most seven shapes.
        strided: Whether some gradients and states have other strides than their parameter.
    """
    generator = torch.Generator().manual_seed(seed)

    def made(shape: tuple[int, ...], kind: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(kind)

    weights = [made(s, torch.float32 if master else dtype, 1.0) for s in shapes]
    parameters, masters = weights, []
    if master == "float32":
        parameters, masters = [w.to(dtype) for w in weights], weights
    elif master == "remainder":
        parameters, masters = map(list, zip(*map(bits.split, weights), strict=True))
    grads = [made(s, grad_dtype or dtype, 1.0) for s in shapes]
    names = [n for n in STATES[algorithm] if n != "max_exp_avg_sq" or options.get("amsgrad")]
    states = {name: [made(s, state_dtype or dtype, 1e-2) for s in shapes] for name in names}
    for name in names:
        if name.endswith("sq"):
            states[name] = [t.abs() * 1e-3 for t in states[name]]
    if strided:
        grads = [_other_strides(g) for g in grads]
        states = {
            name: [_other_strides(t) if i % 2 else t for i, t in enumerate(of)]
            for name, of in states.items()
        }
    stochastic = options.get("rounding") == "stochastic"
    sizes = [w.numel() for w in weights]
    return Update(
        algorithm,
        parameters,
        grads,
        states,
        [torch.tensor(float(first_step + i + 1)) for i in range(len(shapes))] if counted else [],
        hyper_rows(algorithm, **(hyper or {})),
        GROUPS[: len(shapes)],
        options.pop("multiplier", torch.tensor([0.37, 1.0], dtype=torch.float64)),
        SEGMENTS[: len(shapes)],
        options.pop("found_inf", torch.zeros(())),
        options.pop("clean", torch.zeros(())),
        master,
        masters,
        options.pop("rounding", "nearest"),
        [sum(sizes[:i]) for i in range(len(sizes))] if stochastic else [],
        **options,
    )


def copied(update: Update) -> Update:
    """Returns a copy of an update, with the same strides."""
    return copy.deepcopy(update)


def written(update: Update) -> dict[str, Tensor]:
    """Returns all tensors that an update writes, by name."""
    named = {f"parameter {i}": t for i, t in enumerate(update.parameters)}
    named |= {f"master {i}": t for i, t in enumerate(update.masters)}
    named |= {f"step {i}": t for i, t in enumerate(update.steps)}
    for name, of in update.states.items():
        named |= {f"{name} {i}": t for i, t in enumerate(of)}
    return named


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are bitwise equal, including the sign of 0 and NaN."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    kind = kinds[a.itemsize]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def _other_strides(t: Tensor) -> Tensor:
    if t.dim() < 2:
        wide = t.new_zeros(*t.shape, 2)
        wide[..., 0] = t
        return wide[..., 0]
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def clipped_units(update: Update, values: Tensor) -> ClippedUnits:
    """Returns the units that an update clipped, from the result of a backend."""
    positions = range(len(update.parameters))
    return ClippedUnits.of([UnitSummary(values, positions, update.unit_counts)], values.tolist())


def with_unit_limits(
    update: Update, excluded: int, clip_factor: float = 0.9, **options: Any
) -> Update:
    """Limits all units but those of one tensor; about half of the units are clipped."""
    counts = [n_units(p) for p in update.parameters]
    counts[excluded] = 0
    numbers = torch.tensor([clip_factor, 1e-3], dtype=torch.float64)
    return replace(update, units=UnitLimits(numbers, (), **options), unit_counts=counts)
