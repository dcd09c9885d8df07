"""The guard's state under torch.distributed.checkpoint with FSDP2 and several ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from fastguard import GuardedOptimizer, SpikeRule
from guardtest.ranks import Ranks

SPIKE = SpikeRule(window=3, warmup=2)


def build(
    kind: str = "AdamW", spike: SpikeRule | None = SPIKE
) -> tuple[torch.nn.Module, GuardedOptimizer]:
    torch.manual_seed(0)
    model = fully_shard(torch.nn.Linear(4, 6))
    inner = getattr(torch.optim, kind)(model.parameters(), lr=0.1)
    return model, GuardedOptimizer(inner, spike=spike)


def train(model: torch.nn.Module, opt: GuardedOptimizer, steps: range) -> None:
    for i in steps:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * i + dist.get_rank()))
        opt.zero_grad()
        loss = model(x).square().mean() * (math.nan if (i, dist.get_rank()) == (2, 1) else 1.0)
        loss.backward()
        opt.step()
    opt.zero_grad()


def resumed(folder: Path, kwargs: dict[str, Any]) -> Any:
    options = StateDictOptions(**kwargs)
    model, opt = build()
    train(model, opt, range(5))
    weights, optim = get_state_dict(model, opt, options=options)
    if kwargs.get("broadcast_from_rank0"):
        saved = copy.deepcopy((weights, optim))
    else:
        dcp.save({"model": weights, "optim": optim}, checkpoint_id=folder)
    train(model, opt, range(5, 8))

    other, fresh = build()
    if kwargs.get("broadcast_from_rank0"):
        weights, optim = saved if dist.get_rank() == 0 else ({}, {})
    else:
        weights, optim = get_state_dict(other, fresh, options=options)
        dcp.load({"model": weights, "optim": optim}, checkpoint_id=folder)
    set_model_state_dict(other, weights, options=options)
    set_optimizer_state_dict(other, fresh, optim, options=options)
    counters = (fresh.steps_taken, fresh.applied_steps, fresh.skipped_steps)
    train(other, fresh, range(5, 8))
    same = torch.equal(other.weight.to_local(), model.weight.to_local())
    guards = [o.state_dict()["fastguard"]["rings"] for o in (opt, fresh)]
    return counters, same, torch.equal(*guards)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"flatten_optimizer_state_dict": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ],
    ids=["sharded", "flat", "broadcast"],
)
def test_a_sharded_run_with_a_guard_resumes_exactly(
    two: Ranks, tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    assert two.run(resumed, tmp_path, kwargs) == [((5, 4, 1), True, True)] * 2


def set_on_another(
    kind: str, spike: SpikeRule | None, trained: bool, options: dict[str, Any]
) -> Any:
    """Loads a result of `get_...` with `set_...` into a guard that never saved."""
    model, opt = build(kind, spike)
    train(model, opt, range(5))
    get_options = {k: v for k, v in options.items() if k != "broadcast_from_rank0"}
    saved = get_optimizer_state_dict(model, opt, options=StateDictOptions(**get_options))
    saved = copy.deepcopy(saved)
    if options.get("full_state_dict") and dist.get_rank() != 0:
        saved = {}
    if options.get("full_state_dict") and not options.get("broadcast_from_rank0"):
        box = [saved]  # with cpu_offload, only rank 0 has the state
        dist.broadcast_object_list(box, src=0)
        (saved,) = box
    other, fresh = build(kind, spike)
    if trained:
        train(other, fresh, range(2))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, saved, options=StateDictOptions(**options))
    counters = (fresh.steps_taken, fresh.applied_steps, fresh.skipped_steps)
    train(model, opt, range(5, 7))
    train(other, fresh, range(5, 7))
    same = torch.equal(other.weight.to_local(), model.weight.to_local())
    return counters, same, any("fastguard" in g for o in (opt, fresh) for g in o.param_groups)


@pytest.mark.parametrize(
    ("spike", "trained", "offload"),
    [(None, True, False), (SPIKE, False, True)],
    ids=["default, trained", "spikes, fresh, offloaded"],
)
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"flatten_optimizer_state_dict": True},
        {"full_state_dict": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ],
    ids=["sharded", "flat", "full", "broadcast"],
)
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_every_form_of_state_dict_loads_into_a_sharded_guard(
    two: Ranks,
    kind: str,
    form: dict[str, bool],
    spike: SpikeRule | None,
    trained: bool,
    offload: bool,
) -> None:
    """SGD without momentum has no state, and torch drops its empty dict."""
    options = {**form, "cpu_offload": offload}
    results = two.run(set_on_another, kind, spike, trained, options)
    assert results == [((5, 4, 1), True, False)] * 2
