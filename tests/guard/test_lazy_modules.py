"""Lazy modules: parameters without a shape until the first forward pass."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import fastguard
from fastguard import CheckpointStore, FlatGradBuckets, GuardedOptimizer, Rollback
from guardtest.training import assert_same_bits, snapshot

NAN = float("nan")


def lazy_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(2))


def half_lazy_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LazyLinear(2))


MODELS = {"lazy": lazy_model, "half lazy": half_lazy_model}
INNER = {
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "fused momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
}


def train(model, opt, steps, bad=()):
    for step in steps:
        torch.manual_seed(step)
        opt.zero_grad()
        loss = model(torch.randn(5, 3)).square().mean()
        (loss * NAN if step in bad else loss).backward()
        opt.step()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("flat", [False, True, "trusted"], ids=["", "flat", "trusted"])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_a_guard_created_before_the_first_forward_pass_steps_as_the_bare_optimizer(
    model, inner, flat, scope, caplog
):
    bare, guarded = MODELS[model](), MODELS[model]()
    plain = INNER[inner](bare.parameters())
    with caplog.at_level(logging.INFO, "fastguard"):
        opt = GuardedOptimizer(
            INNER[inner](guarded.parameters()),
            clip_scope=scope,
            named_parameters=guarded.named_parameters(),
            flat_buckets=flat,
        )
    assert "lazy" in opt.describe() and "lazy" in caplog.text
    train(bare, plain, range(3))
    train(guarded, opt, range(3))
    assert_same_bits(snapshot(opt), snapshot(plain))
    train(guarded, opt, [3], bad=[3])
    assert_same_bits(snapshot(opt), snapshot(plain))
    assert (opt.applied_steps, opt.skipped_steps) == (3, 1)
    assert opt.records()[-1].culprits[0][0] == "0.weight"
    assert "lazy" not in opt.describe()


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_a_step_before_the_first_forward_pass_does_nothing(flat):
    model = lazy_model()
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters()), max_norm=1.0, flat_buckets=flat)
    opt.step()
    opt.zero_grad()
    assert all(is_lazy(p) for p in model.parameters())
    assert opt.records()[0].total_norm == 0.0
    train(model, opt, range(2))
    assert opt.applied_steps == 3


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_a_bad_first_step_is_skipped(flat):
    model = lazy_model()
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), flat_buckets=flat
    )
    train(model, opt, [0], bad=[0])
    twin = lazy_model()
    torch.manual_seed(0)
    twin(torch.randn(5, 3))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert opt.skipped_steps == 1


def test_a_lazy_param_group_can_be_added_and_copied():
    model, more = nn.Linear(3, 4), nn.LazyLinear(2)
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    opt.add_param_group({"params": more.parameters()})
    both = nn.Sequential(model, more)
    twin_model, twin = copy.deepcopy((both, opt))
    train(both, opt, range(2))
    train(twin_model, twin, range(2))
    assert_same_bits(snapshot(twin), snapshot(opt))


def test_functions_accept_lazy_parameters():
    model = half_lazy_model()
    clip, torchs = fastguard.clip_grad_norm_, torch.nn.utils.clip_grad_norm_
    model[0](torch.ones(1, 3)).sum().backward()
    twin = [nn.Parameter(torch.empty_like(p)) for p in model[0].parameters()]
    for p, q in zip(model[0].parameters(), twin, strict=True):
        q.grad = p.grad.clone()
    stats = fastguard.measure_grads(model.named_parameters())
    assert clip(model.parameters(), 0.5).item() == pytest.approx(stats.total_norm.item())
    torchs(twin, 0.5)
    for p, q in zip(model[0].parameters(), twin, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    fastguard.clip_grad_value_(model.parameters(), 0.1)
    fastguard.sanitize_grads_(model.named_parameters())
    fastguard.clip_grads_with_norm_(model.parameters(), 0.5, torch.tensor(1.0))
    assert fastguard.measure_grads(model.parameters()).total_norm > 0


@pytest.mark.parametrize("function", ["clip_grad_norm_", "measure_grads", "sanitize_grads_"])
def test_functions_return_norm_zero_if_all_parameters_are_lazy(function):
    arguments = (1.0,) if function == "clip_grad_norm_" else ()
    found = getattr(fastguard, function)(lazy_model().parameters(), *arguments)
    assert getattr(found, "total_norm", found) == 0.0


@pytest.mark.parametrize("trusted", [False, True], ids=["", "trusted"])
def test_flat_buckets_include_lazy_parameters_once_they_have_a_gradient(trusted):
    model = lazy_model()
    flat = FlatGradBuckets(model.named_parameters(), trusted=trusted)
    assert flat.measure().total_norm == 0.0
    flat.zero_()
    model(torch.ones(2, 3)).sum().backward()
    assert flat.measure().total_norm == pytest.approx(
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    )
    flat.zero_()
    assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_rollback_goes_back_to_the_state_before_the_first_step(model):
    model = MODELS[model]()
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
    rollback = Rollback(opt, {"model": model}, every=2, after_skips=2, position="start")
    assert rollback.snapshots == []
    torch.manual_seed(0)
    with torch.no_grad():
        model(torch.randn(5, 3))
    before = copy.deepcopy(model.state_dict())
    for batch in range(2):
        train(model, opt, [batch], bad=[batch])
        rewind = rollback.step(batch)
    assert (rewind.step, rewind.position, rewind.skip) == (0, "start", (0, 1))
    for name, value in model.state_dict().items():
        if "running" not in name and "tracked" not in name:  # batch statistics have changed
            assert torch.equal(value, before[name])
    for batch in range(2, 5):
        train(model, opt, [batch])
        rollback.step(batch)
    assert rollback.snapshots == [0, 2]


def test_rollback_into_a_store_waits_for_the_first_forward_pass_too(tmp_path):
    model = lazy_model()
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    rollback = Rollback(opt, {"model": model}, every=1, store=CheckpointStore(tmp_path))
    assert rollback.snapshots == []
    train(model, opt, [0])
    assert rollback.snapshots == [0]
    rollback.step(0)
    assert rollback.snapshots == [0, 1]


def test_a_rollback_before_the_first_forward_pass_gives_the_reason():
    model = lazy_model()
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    rollback = Rollback(opt, {"model": model})
    with pytest.raises(fastguard.TrainingDivergedError, match="there is no snapshot"):
        rollback.trigger()


def test_a_checkpoint_store_refuses_lazy_parameters(tmp_path):
    with pytest.raises(ValueError, match=r"model\.0\.weight belongs to a lazy module"):
        CheckpointStore(tmp_path).save({"model": lazy_model()}, step=0)


@pytest.mark.parametrize("flat", [True, "trusted"])
def test_flat_parameters_include_lazy_parameters(flat):
    bare, guarded = lazy_model(), lazy_model()
    plain = torch.optim.AdamW(bare.parameters(), lr=0.1, fused=True)
    inner = torch.optim.AdamW(guarded.parameters(), lr=0.1)
    opt = GuardedOptimizer(inner, flat_parameters=flat)
    train(bare, plain, range(3))
    train(guarded, opt, range(4), bad=[3])
    for p, q in zip(guarded.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert (opt.applied_steps, opt.skipped_steps) == (3, 1)


@pytest.mark.parametrize("bad", [False, True], ids=["", "bad first step"])
def test_an_optimizer_that_evaluates_its_closure_may_start_with_lazy_parameters(bad):
    def closure_of(model, opt, factor):
        def closure():
            opt.zero_grad()
            torch.manual_seed(0)
            loss = model(torch.randn(5, 3)).square().mean() * factor
            loss.backward()
            return loss

        return closure

    bare, guarded = lazy_model(), lazy_model()
    plain = torch.optim.LBFGS(bare.parameters(), max_iter=3)
    opt = GuardedOptimizer(torch.optim.LBFGS(guarded.parameters(), max_iter=3))
    if bad:
        opt.step(closure_of(guarded, opt, NAN))
        with torch.no_grad():
            torch.manual_seed(0)
            bare(torch.randn(5, 3))
            assert_same_bits(
                {n: p for n, p in guarded.named_parameters()},
                {n: p for n, p in bare.named_parameters()},
            )
    opt.step(closure_of(guarded, opt, 1.0))
    plain.step(closure_of(bare, plain, 1.0))
    assert (opt.applied_steps, opt.skipped_steps) == (1, int(bad))
    if not bad:
        assert_same_bits(snapshot(opt), snapshot(plain))
