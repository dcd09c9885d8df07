"""Norms across ranks are correct and bitwise equal even if powers leave the float64 range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastguard
from guardtest.ranks import Ranks
from guardtest.spreads import SPREADS, model_gradients, parameter

FAR = (2e200, 1e-200, 1e-310)


def far_gradients(magnitude: float, mixed: bool) -> list[Tensor]:
    """Returns float64 gradients of this magnitude; if `mixed`, some are float32 of order 1."""
    narrow = (0, 1) if mixed else ()
    return [g if i in narrow else g.double() * magnitude for i, g in enumerate(model_gradients())]


def measured(name: str, magnitude: float, p: float, mixed: bool) -> tuple[bytes, float, float]:
    """Returns the norm, as bits and as a number, and the norm after clipping."""
    parts, group = SPREADS[name](far_gradients(magnitude, mixed))
    params = [q for _, q in parts]
    norm = fastguard.measure_grads(params, norm_type=p, group=group).total_norm64
    fastguard.clip_grad_norm_(params, norm.item() / 3, p, group=group)
    after = fastguard.measure_grads(params, norm_type=p, group=group).total_norm64
    return norm.numpy().tobytes(), norm.item(), after.item()


@pytest.mark.parametrize("p", [2.0, 3.5, 1.0, 20.0])
@pytest.mark.parametrize("name", SPREADS)
def test_every_rank_gets_the_norm(four: Ranks, name: str, p: float) -> None:
    for magnitude in FAR:
        if name == "partial" and magnitude == 1e-310:
            continue  # the norm is then a sum of subnormal numbers
        params = [parameter(g) for g in far_gradients(magnitude, False)]
        truth = fastguard.measure_grads(params, norm_type=p).total_norm64.item()
        assert 0.0 < truth < math.inf
        results = four.run(measured, name, magnitude, p, False)
        assert len({bits for bits, *_ in results}) == 1
        assert results[0][1] == pytest.approx(truth, rel=1e-12, abs=0)
        clipped = truth * min(1.0, truth / 3 / (truth + 1e-6))
        assert results[0][2] == pytest.approx(clipped, rel=1e-11, abs=0)


@pytest.mark.parametrize("p", [2.0, 20.0])
@pytest.mark.parametrize("name", ["pipeline", "frozen_elsewhere", "ddp"])
def test_ranks_with_different_dtypes_get_the_same_norm(four: Ranks, name: str, p: float) -> None:
    params = [parameter(g) for g in far_gradients(2e200, True)]
    truth = fastguard.measure_grads(params, norm_type=p).total_norm64.item()
    results = four.run(measured, name, 2e200, p, True)
    assert len({bits for bits, *_ in results}) == 1
    assert results[0][1] == pytest.approx(truth, rel=1e-12)


def stepped() -> tuple[str, str | None, float]:
    import torch.distributed as dist

    p = parameter(torch.full((100,), 1e308, dtype=torch.float64))
    opt = fastguard.GuardedOptimizer(
        torch.optim.SGD([p], lr=1.0), max_norm=1.0, group=dist.group.WORLD
    )
    opt.step()
    (record,) = opt.flush()
    return record.action, record.reason, p.abs().max().item()


def test_a_norm_beyond_float64_is_a_bad_step_on_all_ranks(four: Ranks) -> None:
    assert four.run(stepped) == [("skipped", "nonfinite_grad", 0.0)] * 4
