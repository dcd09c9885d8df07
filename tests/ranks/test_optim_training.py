"""`fastguard.optim` under FSDP2's `fully_shard`, DDP and torch.distributed.checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastguard
import fastguard.optim
from guardtest.rank_guards import a_model

BF16 = torch.bfloat16
# For this dtype, `fully_shard` divides the gradients itself. For other dtypes, old versions of
# torch leave the mean to gloo, which computes the sum.
MEANS = MixedPrecisionPolicy(reduce_dtype=torch.float64)
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "master": dict(dtype=BF16, master="float32"),
    "remainder": dict(dtype=BF16, master="remainder"),
    "stochastic": dict(dtype=BF16, rounding="stochastic"),
    "spikes": dict(spike_threshold=3.0, momentum_reset=30, reset_warmup=5),
}


def build(wrap: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Returns a model and its guard; the model is plain, sharded ("fsdp") or replicated ("ddp")."""
    model = a_model().to(dtype)
    if wrap == "fsdp":
        for layer in (model[0], model[2], model):
            fully_shard(layer, mp_policy=MEANS)
    elif wrap == "ddp":
        model = DistributedDataParallel(model)
    inner = fastguard.optim.AdamW(model.parameters(), lr=1e-2, reproducible=True, **options)
    group = fastguard.Replicated(dist.group.WORLD) if wrap == "ddp" else None
    return model, fastguard.GuardedOptimizer(inner, group=group)


def train(model: Any, opt: Any, steps: range, *, own_batches: bool = False) -> None:
    """Trains; the third step is skipped. Every rank has the same batch, or its own."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        seed = 10 * step + (dist.get_rank() if own_batches else 0)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
        loss = model(x).float().square().mean() * (float("nan") if step == 2 else 1.0)
        opt.zero_grad()
        loss.backward()
        opt.step()


def everything(model: Any, opt: Any) -> list[torch.Tensor]:
    """Returns all weights and states as full tensors."""
    found = []
    for p in model.parameters():
        found += [p.detach(), *opt.optimizer.state[p].values()]
    found = [t.int() if t.dtype is torch.int16 else t for t in found]  # gloo cannot gather int16
    return [t.full_tensor() if isinstance(t, DTensor) else t.clone() for t in found]


def trained(wrap: str, settings: dict[str, Any], own_batches: bool = False) -> list[torch.Tensor]:
    model, opt = build(wrap, **settings)
    train(model, opt, range(40), own_batches=own_batches)
    assert opt.skipped_steps == 1
    return everything(model, opt)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "stochastic"])
@pytest.mark.parametrize("wrap", ["fsdp", "ddp"])
def test_ranks_with_the_same_batch_train_as_one_process_does_bit_for_bit(two, wrap, kind):
    """The mean of two equal gradients is exact, and rounding noise is indexed by shard."""
    alone = trained("", KINDS[kind])
    for whole in two.run(trained, wrap, KINDS[kind]):
        assert all(map(torch.equal, whole, alone))


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_with_their_own_batches_stay_equal(two, kind):
    first, second = two.run(trained, "ddp", KINDS[kind], own_batches=True)
    assert all(map(torch.equal, first, second))


def resumed(folder: Path, settings: dict[str, Any], full: bool) -> bool:
    options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
    model, opt = build("fsdp", **settings)
    train(model, opt, range(5), own_batches=True)
    weights, state = get_state_dict(model, opt, options=options)
    if full:
        saved = copy.deepcopy((weights, state)) if dist.get_rank() == 0 else ({}, {})
    else:
        dcp.save({"model": weights, "optim": state}, checkpoint_id=folder)
    train(model, opt, range(5, 40), own_batches=True)

    other, fresh = build("fsdp", **settings)
    if full:
        weights, state = saved
    else:
        weights, state = get_state_dict(other, fresh, options=options)
        dcp.load({"model": weights, "optim": state}, checkpoint_id=folder)
    set_model_state_dict(other, weights, options=options)
    set_optimizer_state_dict(other, fresh, state, options=options)
    train(other, fresh, range(5, 40), own_batches=True)
    pairs = zip(everything(model, opt), everything(other, fresh), strict=True)
    return all(a.dtype is b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_shards_resumes_bit_for_bit(two, tmp_path, kind, full):
    assert two.run(resumed, tmp_path, KINDS[kind], full) == [True, True]


def refusal() -> str:
    try:
        build("fsdp", update_clipping=True)
    except ValueError as e:
        return str(e)
    return ""


def test_update_clipping_refuses_shards(two):
    for message in two.run(refusal):
        assert "update_clipping=True needs the whole of each tensor" in message
        assert "DTensor" in message and "update_clipping=False" in message


def refusal_of_flat_shards(use_orig_params: bool) -> str:
    model = FullyShardedDataParallel(
        torch.nn.Linear(6, 4), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    fastguard.optim.AdamW(model.parameters())
    try:
        fastguard.optim.AdamW(model.parameters(), update_clipping=True)
    except ValueError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_update_clipping_refuses_flat_shards(two, use_orig_params):
    for message in two.run(refusal_of_flat_shards, use_orig_params):
        assert "a part of a flat tensor of FullyShardedDataParallel" in message
        assert "update_clipping=False" in message
