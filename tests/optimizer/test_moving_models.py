"""A model that goes to another device after its guard was made takes the guard along."""

import math

import torch

from fastguard import GuardedOptimizer, SpikeRule
from guardtest.guarded import train


def guard_of(model: torch.nn.Module, **options) -> GuardedOptimizer:
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    return GuardedOptimizer(inner, max_norm=1.0, spike=SpikeRule(window=8, warmup=4), **options)


def test_a_model_laid_out_on_the_meta_device():
    model = torch.nn.Linear(3, 2, device="meta")
    opt = guard_of(model)
    for p in model.parameters():
        torch.utils.swap_tensors(p, torch.nn.Parameter(torch.ones(p.shape)))
    expected = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(expected.weight)
    torch.nn.init.ones_(expected.bias)
    same = guard_of(expected)
    for guarded in (opt, same):
        train(guarded, [0, 1, 2], bad=[1])
    assert opt.last.total_norm.device.type == "cpu"
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)
    assert opt.records() == same.records()
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, want)
    for name in ("counters", "windows", "rings"):
        saved = (guarded.state_dict()["fastguard"][name] for guarded in (opt, same))
        assert torch.equal(*saved)


def test_where_the_guard_was_before_is_kept_nowhere():
    model = torch.nn.Linear(3, 2, device="meta")
    opt = guard_of(model)
    assert opt.state_dict()["fastguard"]["counters"].is_meta
    for p in model.parameters():
        torch.utils.swap_tensors(p, torch.nn.Parameter(torch.ones(p.shape)))
        p.grad = torch.full_like(p, math.nan)
    opt.step(loss=torch.tensor(1.0))
    (record,) = opt.flush()
    assert record.action == "skipped" and record.losses == {"loss": 1.0}
    assert "on cpu" in opt.describe()
