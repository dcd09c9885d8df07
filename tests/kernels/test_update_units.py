"""The update kernel clips units as `fastguard.optim.reference` does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastguard.kernels import update_table
from fastguard.optim import reference
from fastguard.optim import triton as triton_optim
from guardtest.updates import (
    STORED,
    clipped_units,
    copied,
    random_update,
    same_bits,
    with_unit_limits,
    written,
)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# Aligned and unaligned rows, one or more rows per program, vectors, scalars, an empty tensor.
SHAPES = [(6, 16), (5, 13), (), (0, 3), (70,), (3, 1100), (9, 1)]
CASES: dict[str, dict[str, Any]] = STORED | {
    "spikes": dict(spike_aware=True, hyper={"spike_threshold": 0.3}, first_step=20),
    "tiny": dict(multiplier=torch.full((2,), 2.0**-120, dtype=F64)),
    "lion": dict(algorithm="lion", grad_dtype=BF16),
}


def unit_update(case: str, **options: Any):
    settings = {"algorithm": "adamw", "reproducible": True, "shapes": SHAPES} | CASES[case]
    return with_unit_limits(random_update(**settings), -1, **options)


def check(update):
    """Checks that kernel and reference take the same step, up to a rounding of their norms."""
    expected, before = copied(update), [g.clone() for g in update.grads]
    ours, theirs = triton_optim.update(update), reference.update(expected)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-8, atol=0, equal_nan=True)
    # Any of several units with NaN, or with 0 for Inf, may be named.
    named = 4 if ours[0] > 0 else 2
    assert clipped_units(update, ours)[:named] == clipped_units(update, theirs)[:named]
    others = written(expected)
    for name, t in written(update).items():
        if t.dtype in (torch.int16, BF16):  # a rounding boundary between two numbers
            assert (t.view(torch.int16) != others[name].view(torch.int16)).sum() <= 2, name
            continue
        eps = 4 * torch.finfo(t.dtype).eps  # the coefficient may differ by one rounding
        torch.testing.assert_close(t, others[name], rtol=eps, atol=eps, equal_nan=True)
    assert all(map(same_bits, update.grads, before))
    return ours[0]


@pytest.mark.parametrize("case", CASES)
def test_the_update_kernel_follows_the_reference(case):
    assert 0 < check(unit_update(case)).item() < 0.9


@pytest.mark.parametrize(("case", "longest"), [("fp32", 12), ("stochastic", 64)])
def test_long_units_are_computed_before(case, longest, monkeypatch):
    monkeypatch.setattr(triton_optim, "LONGEST_ROW", longest)
    monkeypatch.setattr(update_table, "chunk_size", lambda *_: 48)
    update = unit_update(case)
    usual = unit_update(case)
    check(update)
    monkeypatch.undo()
    triton_optim.update(usual)
    theirs = written(usual)
    assert all(same_bits(t, theirs[name]) for name, t in written(update).items())


def test_chunks_hold_whole_units(monkeypatch):
    monkeypatch.setattr(update_table, "chunk_size", lambda *_: 48)
    check(unit_update("fp32"))


@pytest.mark.parametrize(("found_inf", "longest"), [(1.0, 12), (math.nan, 2**16)])
def test_a_skipped_step_writes_nothing(found_inf, longest, monkeypatch):
    monkeypatch.setattr(triton_optim, "LONGEST_ROW", longest)
    update = replace(unit_update("fp32"), found_inf=torch.tensor(found_inf))
    before = written(copied(update))
    assert triton_optim.update(update).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert all(same_bits(t, before[name]) for name, t in written(update).items())


@pytest.mark.parametrize(
    ("bad", "propagates", "longest"),
    [(math.nan, True, 12), (math.nan, True, 2**16), (math.inf, True, 2**16), (math.nan, False, 12)],
)
def test_non_finite_gradients(bad, propagates, longest, monkeypatch):
    monkeypatch.setattr(triton_optim, "LONGEST_ROW", longest)
    update = unit_update("fp32", propagates=propagates)
    update.grads[0][2, 3] = bad
    update.grads[5][1, 700] = bad
    smallest = check(update)
    assert smallest.isnan().item() == (propagates and math.isnan(bad))


@pytest.mark.parametrize("clean", [0.0, 1.0])
def test_non_finite_weights_and_cleaned_gradients(clean):
    update = replace(unit_update("fp32"), clean=torch.tensor(clean))
    update.grads[1][2, 3] = math.inf
    update.parameters[0][1, 0] = math.inf
    check(update)


def test_limits_apply_to_unscaled_gradients():
    scale = torch.tensor(2.0**-10)
    update = unit_update("fp32", inv_scale=scale)
    update = replace(update, multiplier=torch.full((2,), 2.0**-10, dtype=F64))
    for g in update.grads:
        g.mul_(1024.0)
    check(update)


def test_limits_may_change_without_a_new_table():
    for factor in (0.9, 1e9):
        smallest = check(unit_update("fp32", clip_factor=factor))
        assert (smallest.item() < 1.0) == (factor < 1.0)
