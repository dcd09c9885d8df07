"""A guard follows a model that is moved to another device after its construction."""

import copy
import math

import pytest
import torch

from fastguard import GuardedOptimizer, SpikeRule
from guardtest.guarded import train


def guard_of(model: torch.nn.Module, **options) -> GuardedOptimizer:
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    return GuardedOptimizer(inner, max_norm=1.0, spike=SpikeRule(window=8, warmup=4), **options)


def give_memory(model: torch.nn.Module) -> None:
    for p in model.parameters():
        torch.utils.swap_tensors(p, torch.nn.Parameter(torch.ones(p.shape)))


def ones() -> torch.nn.Module:
    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        torch.nn.init.ones_(p)
    return model


def assert_the_same(opt: GuardedOptimizer, expected: GuardedOptimizer) -> None:
    assert opt.records() == expected.records()
    for group, other in zip(opt.param_groups, expected.param_groups, strict=True):
        for got, want in zip(group["params"], other["params"], strict=True):
            assert torch.equal(got, want)
    for name in ("counters", "windows", "rings"):
        saved = (guarded.state_dict()["fastguard"][name] for guarded in (opt, expected))
        assert torch.equal(*saved)


@pytest.mark.parametrize("flat", [False, True])
def test_a_model_created_on_the_meta_device(flat):
    model = torch.nn.Linear(3, 2, device="meta")
    opt, expected = guard_of(model, flat_buckets=flat), guard_of(ones(), flat_buckets=flat)
    assert "on cpu" in opt.describe()
    give_memory(model)
    for guarded in (opt, expected):
        train(guarded, [0, 1, 2], bad=[1])
    assert opt.last.total_norm.device.type == "cpu"
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)
    assert_the_same(opt, expected)


def test_a_checkpoint_loaded_before_the_first_step():
    trained = guard_of(ones())
    train(trained, [0, 1, 2], bad=[1])
    saved = trained.state_dict()
    model = torch.nn.Linear(3, 2, device="meta")
    opt, expected = guard_of(model), guard_of(ones())
    assert opt.applied_steps == 0
    give_memory(model)
    for guarded in (opt, expected):
        guarded.load_state_dict(copy.deepcopy(saved))
        train(guarded, [3, 4])
    assert (opt.applied_steps, opt.skipped_steps) == (4, 1)
    assert_the_same(opt, expected)


def test_a_state_saved_on_the_meta_device_can_be_loaded():
    opt, expected = guard_of(torch.nn.Linear(3, 2, device="meta")), guard_of(ones())
    expected.load_state_dict(opt.state_dict())
    for p in (p for group in expected.param_groups for p in group["params"]):
        p.grad = torch.full_like(p, math.nan)
    expected.step()
    assert (expected.applied_steps, expected.skipped_steps) == (0, 1)


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_without_memory_are_refused(flat):
    model = torch.nn.Linear(3, 2, device="meta")
    opt = guard_of(model, flat_buckets=flat)
    model(torch.ones(1, 3, device="meta")).sum().backward()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter 0 is on the meta device.*to_empty"):
            opt.step()
    assert opt.steps_taken == 0
    give_memory(model)
    train(opt, [0])
    assert opt.applied_steps == 1


def said(opt: GuardedOptimizer, caplog) -> list[str]:
    caplog.clear()
    with caplog.at_level("WARNING", logger="fastguard"):
        opt.step()
        opt.step()
    return [r.getMessage() for r in caplog.records]


def test_a_first_step_without_gradients_gives_one_warning(caplog):
    model = ones()
    (message,) = said(guard_of(model), caplog)
    assert "no parameter has a gradient" in message and "loss.backward()" in message
    assert "meta" not in message
    model.bias.grad = torch.ones(2)
    assert said(guard_of(model), caplog) == []


def test_parameters_that_no_longer_belong_to_the_model_give_a_warning(caplog):
    """`to_empty` replaces parameters, but the optimizer's parameters stay on the meta device."""
    model = torch.nn.Linear(3, 2, device="meta")
    opt = guard_of(model)
    model.to_empty(device="cpu")
    model(torch.ones(1, 3)).sum().backward()
    (message,) = said(opt, caplog)
    assert "no longer belong to the model" in message
    assert "create the optimizer after model.to_empty" in message
