"""An update that clips units gives the same results as clipping the gradients before it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastguard.optim import cpu, reference
from fastguard.optim.contract import Update
from guardtest.updates import (
    STORED,
    clipped_units,
    copied,
    random_update,
    same_bits,
    with_unit_limits,
    written,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CASES: dict[str, dict[str, Any]] = STORED | {
    "fp16": dict(dtype=F16),
    "bf16 gradients": dict(grad_dtype=BF16),
    "one multiplier": dict(multiplier=torch.ones(2, dtype=F64)),
    "tiny multiplier": dict(multiplier=torch.full((2,), 2.0**-120, dtype=F64)),
    "spikes": dict(spike_aware=True, hyper={"spike_threshold": 0.3}, first_step=20),
}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": dict(algorithm="adamw"),
    "amsgrad": dict(algorithm="adamw", amsgrad=True),
    "sgd": dict(algorithm="sgd"),
    "lion": dict(algorithm="lion"),
}


PAIRS = [("adamw", case) for case in CASES] + [(kind, "fp32") for kind in list(KINDS)[1:]]


def unit_update(kind: str, case: str, **options: Any) -> Update:
    update = random_update(**KINDS[kind], **CASES[case], reproducible=True)
    return with_unit_limits(update, -2, **options)


def coefs_of(update: Update) -> dict[int, torch.Tensor]:
    return {i: reference.unit_coefs(update, i) for i, n in enumerate(update.unit_counts) if n}


def clipped_before(update: Update) -> tuple[Update, float]:
    """Returns the same update of gradients clipped in float64, and the smallest coefficient."""
    coefs = coefs_of(update)
    grads = [g.clone() for g in update.grads]
    for i, own in coefs.items():
        g = grads[i].double()
        product = g * own.reshape(-1, *[1] * (g.dim() - 1)) if g.dim() else g * own[0]
        grads[i] = product.to(grads[i].dtype)
    least = min(own.min().item() for own in coefs.values())
    return replace(update, grads=grads, units=None, unit_counts=()), least


def assert_close(ours: Update, theirs: Update, roundings: int = 8) -> None:
    expected = written(theirs)
    for name, t in written(ours).items():
        if t.dtype is torch.int16:
            continue  # a remainder has no meaning without its weight
        eps = roundings * torch.finfo(t.dtype).eps
        torch.testing.assert_close(t, expected[name], rtol=eps, atol=eps)


@pytest.mark.parametrize(
    ("kind", "case"),
    [("sgd", "fp32"), ("adamw", "fp64"), ("adamw", "strided"), ("adamw", "spikes")],
)
@pytest.mark.parametrize("backend", [reference, cpu])
def test_clipping_in_the_update_equals_clipping_before_it(backend, kind, case):
    update = unit_update(kind, case)
    expected, least = clipped_before(copied(update))
    grads = [g.clone() for g in update.grads]
    n_clipped = sum(int((c != 1.0).sum()) for c in coefs_of(update).values())
    smallest, *others = backend.update(update)
    assert others[0] == n_clipped > 0
    reference.update(expected)
    assert_close(update, expected)
    assert all(map(same_bits, update.grads, grads))
    assert 0 < least < 0.9 and smallest.item() == pytest.approx(least, rel=1e-6)
    untouched = unit_update(kind, case)
    reference.update(replace(untouched, units=None, unit_counts=()))
    assert not same_bits(update.parameters[1], untouched.parameters[1])  # clipping had an effect
    assert torch.equal(update.parameters[-2], untouched.parameters[-2])  # this tensor has no limit


@pytest.mark.parametrize(("kind", "case"), PAIRS)
def test_the_cpu_follows_the_reference(kind, case):
    """They agree up to rounding, because the CPU adds the squares of a unit in float32."""
    update = unit_update(kind, case)
    expected = copied(update)
    ours, theirs = cpu.update(update), reference.update(expected)
    assert_close(update, expected)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert clipped_units(update, ours) == clipped_units(update, theirs)


@pytest.mark.parametrize("case", ["fp32", "remainder", "stochastic", "strided"])
def test_the_size_of_pieces_does_not_change_the_result(case, monkeypatch):
    """The smallest pieces are shorter than a row, so rows are split too."""
    results = []
    for size in (50, 4096, 2**20):
        monkeypatch.setattr("fastguard.optim.pieces.PIECE", size)
        update = unit_update("adamw", case)
        cpu.update(update)
        results.append(written(update))
    for a, b in pairwise(results):
        assert all(same_bits(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("found_inf", [1.0, math.nan])
@pytest.mark.parametrize("backend", [reference, cpu])
def test_a_skip_writes_nothing(backend, found_inf):
    update = replace(unit_update("adamw", "fp32"), found_inf=torch.tensor(found_inf))
    before = written(copied(update))
    summary = backend.update(update)
    assert summary is None or summary.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert all(same_bits(t, before[name]) for name, t in written(update).items())


@pytest.mark.parametrize("propagates", [False, True])
@pytest.mark.parametrize("backend", [reference, cpu])
def test_a_nonfinite_element_affects_only_its_unit(backend, propagates):
    update = unit_update("sgd", "fp32", propagates=propagates)
    update.grads[1][3, 5] = math.nan
    other = unit_update("sgd", "fp32")
    smallest = backend.update(update)[0]
    backend.update(other)
    p, q = update.parameters[1], other.parameters[1]
    same = torch.arange(33) != 3
    assert torch.equal(p[same], q[same])
    assert p[3].isnan().sum() == (65 if propagates else 1)
    assert smallest.isnan() == propagates


@pytest.mark.parametrize("backend", [reference, cpu])
def test_cleaned_elements_do_not_count(backend):
    update = replace(unit_update("sgd", "fp32"), clean=torch.ones(()))
    update.grads[1][3, 5] = math.inf
    other = unit_update("sgd", "fp32")
    other.grads[1][3, 5] = 0.0
    backend.update(update)
    backend.update(other)
    assert torch.equal(update.parameters[1], other.parameters[1])


@pytest.mark.parametrize("backend", [reference, cpu])
def test_limits_apply_to_unscaled_gradients(backend):
    scale = torch.tensor(1 / 1024, dtype=F64)
    update = replace(
        unit_update("adamw", "fp32", inv_scale=scale),
        multiplier=torch.full((2,), 1 / 1024, dtype=F64),
    )
    for g in update.grads:
        g.mul_(1024.0)
    other = unit_update("adamw", "one multiplier")
    backend.update(update)
    backend.update(other)
    assert all(map(torch.equal, update.parameters, other.parameters))


@pytest.mark.parametrize("backend", [reference, cpu])
def test_without_units_above_their_limit_nothing_changes(backend):
    update = unit_update("adamw", "fp32", clip_factor=1e9)
    other = replace(copied(update), units=None, unit_counts=())
    assert backend.update(update).tolist() == [1.0, 0.0, 0.0, 0.0]
    backend.update(other)
    theirs = written(other)
    assert all(same_bits(t, theirs[name]) for name, t in written(update).items())
