"""The CPU backend gives the bits of the reference, or its values up to rounding."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastguard.optim import cpu, reference
from guardtest.updates import STORED, copied, random_update, same_bits, written

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CASES: dict[str, dict[str, Any]] = STORED | {
    "fp16": dict(dtype=F16),
    "bf16 gradients": dict(grad_dtype=BF16),
    "bf16 states": dict(state_dtype=BF16),
    "fp16 master": dict(dtype=F16, state_dtype=F32, master="float32"),
    "remainder, bf16 states": dict(dtype=BF16, master="remainder"),
    "stochastic fp16": dict(dtype=F16, rounding="stochastic"),
    "stochastic states": dict(dtype=BF16, master="remainder", rounding="stochastic"),
    "strided remainder": dict(dtype=BF16, state_dtype=F32, master="remainder", strided=True),
    "clean": dict(clean=torch.ones(())),
    "one multiplier": dict(multiplier=torch.ones(2, dtype=F64)),
    "maximize": dict(hyper={"sign": -1.0}),
    "dampening": dict(hyper={"dampening": 0.3}),
}
# The tensors of an update have taken different numbers of steps, so only some of them reset.
SPIKES = dict(spike_aware=True, hyper={"spike_threshold": 0.3, "momentum_reset": 3.0})
ADAMW_CASES: dict[str, dict[str, Any]] = {
    "clipped": dict(update_clipping=True),
    "spikes": SPIKES | dict(first_step=20),
    "resets": SPIKES | dict(hyper={"momentum_reset": 3.0, "reset_warmup": 2.0}),
    "all": SPIKES | dict(hyper={"spike_threshold": 0.3, "momentum_reset": 24.0}, first_step=20),
}
ADAMW_CASES["all"] |= dict(update_clipping=True)
OFF = dict(spike_aware=False, update_clipping=False)
KINDS: dict[str, dict[str, Any]] = {
    "adamw": dict(algorithm="adamw"),
    "adam": dict(algorithm="adam"),
    "amsgrad": dict(algorithm="adamw", amsgrad=True),
    "sgd": dict(algorithm="sgd"),
    "nesterov": dict(algorithm="sgd", nesterov=True),
    "lion": dict(algorithm="lion"),
}


def the_update(kind: str, case: str, **options: Any):
    given = (CASES | ADAMW_CASES)[case] | options
    update = random_update(**KINDS[kind], **given)
    if case == "clean":
        for g in update.grads:
            g.view(-1)[: min(3, g.numel())] = torch.tensor([math.nan, math.inf, -math.inf])[
                : g.numel()
            ]
    return update


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_backend_gives_the_bits_of_the_reference(kind, case):
    assert_the_bits_of_the_reference(the_update(kind, case, reproducible=True))


def assert_the_bits_of_the_reference(update: Any) -> None:
    expected = copied(update)
    grads = [g.clone() for g in update.grads]
    cpu.update(update)
    reference.update(expected)
    theirs = written(expected)
    wrong = [name for name, t in written(update).items() if not same_bits(t, theirs[name])]
    assert wrong == []
    assert all(map(same_bits, update.grads, grads))  # gradients are never written


@pytest.mark.parametrize("kind", ["adamw", "amsgrad"])
@pytest.mark.parametrize("setting", ["fp32", "fp64", "bf16", "remainder", "strided", "clean"])
@pytest.mark.parametrize("case", ADAMW_CASES)
def test_spikes_and_clipping_give_the_bits_of_the_reference(case, setting, kind):
    update = the_update(kind, setting, reproducible=True, **ADAMW_CASES[case])
    before = written(copied(update))
    assert_the_bits_of_the_reference(update)
    plain = the_update(kind, setting, reproducible=True, **ADAMW_CASES[case] | OFF)
    cpu.update(plain)
    after, theirs = written(update), written(plain)
    # The settings had an effect.
    assert any(not same_bits(after[name], theirs[name]) for name in before)


@pytest.mark.parametrize("case", [c for c in CASES if "stochastic" not in c])
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_fused_kernels_stay_close_to_the_reference(kind, case):
    update = the_update(kind, case)
    expected = copied(update)
    cpu.update(update)
    reference.update(expected)
    theirs = written(expected)
    for name, t in written(update).items():
        if name.startswith("master") and t.dtype is torch.int16:
            continue  # a remainder has no meaning without its weight
        # Four roundings of the stored dtype; in 16 bits, one of them may cross a rounding boundary.
        eps = 8 * torch.finfo(t.dtype).eps
        torch.testing.assert_close(t, theirs[name], rtol=eps, atol=eps, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", ["fp32", "remainder", "stochastic", "master"])
@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skip_writes_nothing(kind, case, found_inf):
    update = the_update(kind, case, found_inf=torch.tensor(found_inf))
    before = copied(update)
    cpu.update(update)
    theirs = written(before)
    assert all(same_bits(t, theirs[name]) for name, t in written(update).items())


@pytest.mark.parametrize("case", ["fp32", "remainder", "stochastic"])
def test_the_size_of_pieces_does_not_change_the_result(case, monkeypatch):
    results = []
    for size in (64, 4096, 2**20):
        monkeypatch.setattr("fastguard.optim.pieces.PIECE", size)
        update = the_update("adamw", case, reproducible=True)
        cpu.update(update)
        results.append(written(update))
    for a, b in pairwise(results):
        assert all(same_bits(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("case", ["fp32", "bf16", "remainder", "stochastic", "clean", "all"])
@pytest.mark.parametrize("kind", ["adamw", "amsgrad"])
def test_the_default_device_changes_nothing(kind, case):
    expected = the_update(kind, case)
    update = copied(expected)
    cpu.update(expected)
    with torch.device("meta"):  # as after torch.set_default_device("cuda")
        cpu.update(update)
    theirs = written(expected)
    assert all(same_bits(t, theirs[name]) for name, t in written(update).items())


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_nan_gradient_makes_the_weight_nan(reproducible):
    update = the_update("adamw", "remainder", reproducible=reproducible)
    # A NaN with the bits that a GPU produces. Rounding half up would carry into its sign bit.
    update.grads[1].view(torch.int16).fill_(0x7FFF)
    cpu.update(update)
    assert update.parameters[1].isnan().all()
    assert not update.parameters[0].isnan().any()


def test_a_remainder_and_a_master_train_bit_for_bit_alike():
    exact = the_update("adamw", "master", reproducible=True)
    split = the_update("adamw", "remainder", reproducible=True)
    for _ in range(3):
        cpu.update(exact)
        cpu.update(split)
    for i, master in enumerate(exact.masters):
        assert same_bits(reference.weight_of(split, i), master)
