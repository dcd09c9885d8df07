"""Statistics of an update: norms of weights and of their changes, and non-finite weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastguard.optim as fused
from fastguard.optim import cpu, reference
from fastguard.optim.contract import Update
from guardtest.updates import STORED, copied, random_update, same_bits, with_unit_limits, written

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CASES: dict[str, dict[str, Any]] = STORED | {
    "fp16": dict(dtype=F16),
    "bf16 gradients": dict(grad_dtype=BF16),
    "fp16 master": dict(dtype=F16, state_dtype=F32, master="float32"),
    "clean": dict(clean=torch.ones(())),
    "one multiplier": dict(multiplier=torch.ones(2, dtype=F64)),
    "reproducible": dict(reproducible=True),
}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": dict(algorithm="adamw"),
    "adam": dict(algorithm="adam"),
    "sgd": dict(algorithm="sgd"),
    "lion": dict(algorithm="lion"),
}
PAIRS = [("adamw", case) for case in CASES]
PAIRS += [(kind, case) for kind in list(KINDS)[1:] for case in ("fp32", "bf16", "remainder")]
BACKENDS = pytest.mark.parametrize("backend", [cpu, reference])
RTOL = 1e-6  # for sums of squares, which the CPU partly adds in float32


def asked(update: Update) -> Update:
    zeros = torch.zeros(len(update.parameters), 3, dtype=F64)
    return replace(update, statistics=zeros)


def weights_of(update: Update) -> list[Tensor]:
    return [reference.weight_of(update, i).double().clone() for i in range(len(update.parameters))]


def expected(update: Update, before: list[Tensor]) -> Tensor:
    """Returns the statistics in float64, from all weights before and after the step."""
    rows = []
    for old, new, p in zip(before, weights_of(update), update.parameters, strict=True):
        sums = [x[x.isfinite()].square().sum() for x in (old, new - old)]
        rows.append(torch.stack([*sums, (~p.isfinite()).sum().double()]))
    return torch.stack(rows)


def check(backend: Any, update: Update, rtol: float = RTOL) -> Tensor:
    """Checks the statistics of a step, and that they change nothing else."""
    update, plain = asked(update), copied(update)
    before = weights_of(update)
    backend.update(update)
    backend.update(plain)
    assert update.statistics is not None
    torch.testing.assert_close(update.statistics, expected(update, before), rtol=rtol, atol=0)
    theirs = written(plain)
    wrong = [name for name, t in written(update).items() if not same_bits(t, theirs[name])]
    assert wrong == []
    return update.statistics


@pytest.mark.parametrize(("kind", "case"), PAIRS)
@BACKENDS
def test_statistics_refer_to_the_exact_weights(backend, kind, case):
    found = check(backend, random_update(**KINDS[kind], **CASES[case]))
    assert (found[[1, 5, 6], :2] > 0).all() and not found[:, 2].any()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@BACKENDS
def test_with_limits_of_units(backend, kind):
    check(backend, with_unit_limits(random_update(**KINDS[kind]), -2))


@pytest.mark.parametrize(
    "options",
    [
        dict(update_clipping=True),
        dict(spike_aware=True, hyper={"spike_threshold": 0.3, "momentum_reset": 3.0}),
    ],
    ids=["update clipping", "spikes"],
)
@BACKENDS
def test_with_update_clipping_and_spikes(backend, options):
    check(backend, random_update("adamw", **options))


@pytest.mark.parametrize("size", [64, 5000])
@pytest.mark.parametrize("case", ["fp32", "bf16", "remainder", "strided"])
def test_the_size_of_pieces_does_not_matter(case, size, monkeypatch):
    monkeypatch.setattr("fastguard.optim.pieces.PIECE", size)
    check(cpu, random_update("adamw", **CASES[case]))


@pytest.mark.parametrize("found_inf", [1.0, math.nan])
@pytest.mark.parametrize("case", ["fp32", "remainder"])
@BACKENDS
def test_a_skipped_step_leaves_zeros(backend, case, found_inf):
    skipped = random_update("adamw", **CASES[case], found_inf=torch.tensor(found_inf))
    update = asked(skipped)
    backend.update(update)
    assert update.statistics is not None and not update.statistics.any()


@pytest.mark.parametrize("scale", [1e25, 1e-25])
@BACKENDS
def test_squares_out_of_the_range_of_float32(backend, scale):
    """The squares are in a long tensor, and in short tensors that are joined."""
    update = random_update("sgd", multiplier=torch.full((2,), scale, dtype=F64))
    for p, m in zip(update.parameters, update.states["momentum_buffer"], strict=True):
        p.mul_(scale)
        m.zero_()
    check(backend, update)


@BACKENDS
def test_weights_that_do_not_change(backend):
    update = random_update("sgd", hyper={"lr": 0.0})
    assert not check(backend, update)[:, 1].any()


@pytest.mark.parametrize("case", ["fp32", "bf16", "master", "remainder", "fp16 master", "fp64"])
@BACKENDS
def test_nonfinite_weights_are_counted_and_not_summed(backend, case):
    update = random_update("sgd", **CASES[case])
    for bad, i in ((math.nan, 1), (math.inf, 6)):  # one in a short tensor, one in a long tensor
        update.grads[i].view(-1)[2:5] = bad
    weights = update.masters if update.master == "float32" else update.parameters
    weights[1].view(-1)[0] = math.inf  # non-finite before the step
    found = check(backend, update)
    assert found[:, 2].tolist() == [0, 4, 0, 0, 0, 0, 3]


@BACKENDS
def test_a_parameter_that_overflows_although_its_master_is_finite(backend):
    update = random_update("sgd", **CASES["fp16 master"])
    update.masters[5][:2] = 7e4
    update.masters[1][0, :3] = -7e4
    found = check(backend, update)
    assert found[:, 2].tolist() == [0, 3, 0, 0, 0, 2, 0]


def optimizer_of(*parameters: Tensor, lr: float = 0.5, **options: Any) -> fused.SGD:
    for p in parameters:
        p.grad = torch.ones_like(p)
    return fused.SGD(parameters, lr=lr, **options)


def test_an_optimizer_collects_statistics_within_a_block():
    a, b = torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.ones(1).double())
    unused = torch.nn.Parameter(torch.ones(1))
    optimizer = optimizer_of(a, b)
    optimizer.add_param_group({"params": [unused]})
    with optimizer.collecting_statistics() as statistics:
        assert statistics.parameters == [] and statistics.update_ratios.tolist() == []
        optimizer.step()
    assert [id(p) for p in statistics.parameters] == [id(a), id(b)]
    assert statistics.weight_norms.tolist() == [5.0, 1.0]
    assert statistics.update_norms.tolist() == [pytest.approx(math.sqrt(0.5)), 0.5]
    assert statistics.update_ratios.tolist() == [pytest.approx(math.sqrt(0.02)), 0.5]
    assert statistics.nonfinite_counts.tolist() == [0, 0]
    optimizer.step()
    assert statistics.weight_norms.tolist() == [5.0, 1.0]  # the block has ended


def test_statistics_refer_to_the_latest_step():
    p = torch.nn.Parameter(torch.tensor(4.0))
    optimizer = optimizer_of(p)
    with optimizer.collecting_statistics() as outer:
        optimizer.step()
        with optimizer.collecting_statistics() as inner:
            optimizer.step()
        assert inner.weight_norms.tolist() == outer.weight_norms.tolist() == [3.5]
        optimizer.step()
    assert (inner.weight_norms.tolist(), outer.weight_norms.tolist()) == ([3.5], [3.0])


def test_a_step_that_a_scaler_skips_has_no_statistics():
    p = torch.nn.Parameter(torch.tensor(4.0))
    optimizer = optimizer_of(p)
    with optimizer.collecting_statistics() as statistics:
        optimizer.step()
        optimizer.found_inf = torch.ones(())
        optimizer.step()
    assert statistics.parameters == []


def test_an_exception_ends_the_block():
    optimizer = optimizer_of(torch.nn.Parameter(torch.tensor(4.0)))
    with pytest.raises(KeyError), optimizer.collecting_statistics() as statistics:
        raise KeyError
    optimizer.step()
    assert statistics.parameters == []
