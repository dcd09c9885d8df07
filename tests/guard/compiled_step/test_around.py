"""A compiled step works with state dicts, hooks, scalers, copies, closures and failures."""

import copy
import math

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fastguard import GuardedOptimizer
from fastguard.config import GuardConfig
from guardtest.compiled import assert_same_bits, compiled, give, parameters, tensors_of
from guardtest.tolerances import COMPILED_RTOL

NAN = float("nan")


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def run(opt, params, seeds):
    for seed in seeds:
        give(params, seed)
        opt.step()


def assert_close(params, others):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=COMPILED_RTOL, atol=1e-6)


def test_its_description_is_correct():
    params = parameters()
    opt = compiled(adamw(params))
    assert opt.sync_free
    assert opt.describe().endswith("skips through found_inf in a compiled update")
    opt.optimizer.register_step_post_hook(lambda *_: None)
    assert opt.describe().endswith("after reading the verdict")


def test_a_configuration_file_can_enable_it():
    model = torch.nn.Linear(2, 2)
    config = GuardConfig.from_dict({"guard": {"compile_step": True}})
    opt = config.wrap(model, adamw(model.parameters()))
    assert "compiled update" in opt.describe()


def test_state_dicts_are_exchangeable_with_the_bare_optimizer():
    params, others = parameters(), parameters()
    opt, bare = compiled(adamw(params), max_norm=None), adamw(others)
    run(opt, params, range(3))
    saved = copy.deepcopy(opt.optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    bare.load_state_dict(saved)
    assert_same_bits(tensors_of(opt.optimizer), tensors_of(bare))
    run(bare, others, range(3, 6))
    run(opt, params, range(3, 6))
    assert_close(params, others)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            p.copy_(q)
    opt.load_state_dict(copy.deepcopy(bare.state_dict()))
    run(opt, params, range(6, 9))
    run(bare, others, range(6, 9))
    assert_close(params, others)
    assert opt._stepper._n_compiled == 1  # loading causes no compilation


def test_loading_a_state_without_tensors_recreates_them():
    params = parameters()
    opt = compiled(adamw(params))
    fresh = copy.deepcopy(opt.state_dict())
    run(opt, params, range(2))
    opt.load_state_dict(fresh)
    run(opt, params, range(1))
    assert [opt.state[p]["step"].item() for p in params] == [1.0, 1.0]


def test_a_param_group_that_is_added():
    params, others = parameters(), parameters()
    opt = compiled(adamw(params[:1]))
    plain = GuardedOptimizer(adamw(others[:1]), max_norm=1.0)
    for some, o in ((params, opt), (others, plain)):
        run(o, some[:1], range(2))
        o.add_param_group({"params": some[1:], "lr": 0.1})
        run(o, some, range(2, 5))
    assert_close(params, others)


def test_a_copy_steps_independently():
    params = parameters()
    opt = compiled(adamw(params))
    run(opt, params, range(2))
    twin = copy.deepcopy(opt)
    theirs = twin.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    run(twin, theirs, range(2, 4))
    assert all(p.equal(q) for p, q in zip(params, before, strict=True))
    run(opt, params, range(2, 4))
    assert_same_bits(tensors_of(opt.optimizer), tensors_of(twin.optimizer))


def test_a_loss_scaler():
    params, others = parameters(), parameters()
    opt = compiled(adamw(params))
    plain = GuardedOptimizer(adamw(others), max_norm=1.0)
    for some, o in ((params, opt), (others, plain)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        for seed in range(5):
            give(some, seed, math.inf if seed == 2 else None)
            for p in some:
                p.grad *= scaler.get_scale()
            scaler.step(o)
            scaler.update()
        assert scaler.get_scale() == 512.0
        assert o.loss_scale_skips == 1
    assert_close(params, others)


def test_hooks_of_the_wrapped_optimizer_run_only_when_it_steps():
    params, calls = parameters(), []
    opt = compiled(adamw(params))
    opt.optimizer.register_step_pre_hook(lambda *_: calls.append("inner"))
    opt.register_step_post_hook(lambda *_: calls.append("outer"))
    for seed, value in enumerate((None, NAN, None)):
        give(params, seed, value)
        opt.step()
    assert calls == ["inner", "outer", "outer", "inner", "outer"]


def test_global_post_hooks_see_the_new_weights():
    params = parameters()
    opt = compiled(adamw(params))
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append(params[0].detach().clone())),
        register_optimizer_step_post_hook(lambda *_: seen.append(params[0].detach().clone())),
    ]
    try:
        start = params[0].detach().clone()
        run(opt, params, [0])
        assert torch.equal(seen[0], start) and torch.equal(seen[1], params[0])
        handles.append(register_optimizer_step_post_hook(lambda *_: 1 / 0))
        give(params, 1)
        with pytest.raises(ZeroDivisionError):
            opt.step()
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(seen[-1], params[0]) and not torch.equal(seen[-1], seen[1])
    assert (opt.steps_taken, opt.applied_steps, len(opt.records())) == (2, 2, 2)


def test_a_closure_is_evaluated_once():
    params, losses = parameters(), []
    opt = compiled(adamw(params))

    def closure():
        give(params, len(losses))
        losses.append(len(losses))
        return torch.tensor(float(losses[-1]))

    assert [opt.step(closure).item() for _ in range(3)] == [0.0, 1.0, 2.0]
    assert opt.applied_steps == 3


def test_a_scheduler_of_the_wrapped_optimizer_counts_the_step(recwarn):
    params = parameters()
    inner = torch.optim.SGD(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1)
    opt = compiled(inner)
    run(opt, params, range(1))
    scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


@pytest.mark.parametrize("stop", [RuntimeError("no compiler"), KeyboardInterrupt()], ids=str)
def test_a_failure_to_compile_takes_no_step(monkeypatch, stop):
    params, failures = parameters(), [stop]

    def backend(graph, inputs):
        if failures:
            raise failures.pop()
        return graph.forward

    monkeypatch.setattr("fastguard.guard.compiled_step.BACKEND", backend)
    opt = compiled(torch.optim.SGD(params, lr=0.1))
    before = [p.detach().clone() for p in params]
    give(params, 0)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        opt.step()
    assert opt.steps_taken == 0
    assert all(p.equal(q) for p, q in zip(params, before, strict=True))
    opt.step()
    assert opt.applied_steps == 1
    assert not any(p.equal(q) for p, q in zip(params, before, strict=True))


def test_flat_buckets():
    params, others = parameters(), parameters()
    opt = compiled(adamw(params), flat_buckets=True)
    plain = GuardedOptimizer(adamw(others), max_norm=1.0)
    for some, o in ((params, opt), (others, plain)):
        run(o, some, range(3))
    assert_close(params, others)
