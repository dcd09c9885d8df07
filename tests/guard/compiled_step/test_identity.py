"""A skipped step changes no bit; an applied step equals the optimizer's."""

import inspect

import pytest
import torch

from fastguard import GuardedOptimizer
from fastguard.guard.compiled_state import STATE_FROM_LR
from guardtest import long_tests
from guardtest.compiled import (
    OPTIMIZERS,
    assert_same_bits,
    compiled,
    give,
    parameters,
    tensors_of,
)
from guardtest.tolerances import COMPILED_RTOL

NAN = float("nan")
STORY = (NAN, None, NAN, None, NAN, NAN, None, None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_story_of_skips(name):
    make, shapes = OPTIMIZERS[name]
    params, others = parameters(shapes), parameters(shapes)
    opt = compiled(make(params), max_norm=1.0)
    plain = GuardedOptimizer(make(others), max_norm=1.0)
    fresh = tensors_of(make(parameters(shapes)))
    for seed, value in enumerate(STORY):
        give(params, seed, value)
        give(others, seed, value)
        before = tensors_of(opt.optimizer)
        opt.step()
        plain.step()
        after = tensors_of(opt.optimizer)
        if seed == 0 and not isinstance(opt.optimizer, STATE_FROM_LR):
            # the state is created with torch's initial values
            assert_same_bits(fresh, {k: after[k] for k in fresh})
            assert_same_bits(_started(name), after)
        elif value is not None:
            assert_same_bits(before, after)
    assert opt.skipped_steps == plain.skipped_steps == 4
    assert opt._stepper._n_compiled == 1
    # Muon rounds its matrix products to bfloat16, but generated code rounds at other places; lr is
    # 0.01.
    atol = 1e-6 if name != "Muon" else 1e-3
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=COMPILED_RTOL, atol=atol)


def _started(name):
    """Returns torch's initial state, as created before the first update."""
    make, shapes = OPTIMIZERS[name]
    params = parameters(shapes)
    give(params, 0)
    inner = make(params)
    lists = [[] for _ in inspect.signature(inner._init_group).parameters][1:]
    inner._init_group(inner.param_groups[0], *lists)
    if name == "SGD":
        for p in params:
            inner.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return tensors_of(inner)


@pytest.mark.parametrize("name", OPTIMIZERS if long_tests() else ["AdamW"])
def test_generated_code_gives_the_same_results(monkeypatch, name):
    monkeypatch.setattr("fastguard.guard.compiled_step.BACKEND", "inductor")
    test_a_story_of_skips(name)


def test_the_stories_cover_every_dense_optimizer_of_torch():
    kinds = [k for k in vars(torch.optim).values() if isinstance(k, type)]
    found = {k.__name__ for k in kinds if issubclass(k, torch.optim.Optimizer)}
    assert set(OPTIMIZERS) == found - {"Optimizer", "LBFGS", "SparseAdam"}
    assert len(OPTIMIZERS) >= 12


def test_gradients_are_not_changed():
    params = parameters()
    opt = compiled(torch.optim.SGD(params, lr=1.0), max_norm=1e-3)
    give(params, 0)
    before = [p.grad.clone() for p in params]
    weights = [p.detach().clone() for p in params]
    opt.step()
    assert all(p.grad.equal(g) for p, g in zip(params, before, strict=True))
    moved = [(w - p).detach().flatten() for p, w in zip(params, weights, strict=True)]
    torch.testing.assert_close(torch.cat(moved).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    others = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    opt = compiled(torch.optim.SGD(params, lr=0.5))
    plain = GuardedOptimizer(torch.optim.SGD(others, lr=0.5), max_norm=1.0)
    for seed in range(3):
        give(params, seed)
        give(others, seed)
        opt.step()
        plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_a_coefficient_below_normal_float32():
    params, others = parameters(), parameters()
    opt = compiled(torch.optim.SGD(params, lr=1e10), max_norm=1e-10)
    plain = GuardedOptimizer(torch.optim.SGD(others, lr=1e10), max_norm=1e-10)
    for some in (params, others):
        give(some, 0)
        for p in some:
            p.grad *= 1e33
    opt.step()
    plain.step()
    assert 0 < float(opt.last.multiplier) < torch.finfo(torch.float32).tiny
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_each_segment_has_its_own_coefficient(scope):
    params, others = parameters(), parameters()
    groups, theirs = (
        [
            {"params": [p], **({"max_norm": 0.1 * 10**i} if scope == "group" else {})}
            for i, p in enumerate(some)
        ]
        for some in (params, others)
    )
    opt = compiled(torch.optim.AdamW(groups), clip_scope=scope)
    plain = GuardedOptimizer(torch.optim.AdamW(theirs), max_norm=1.0, clip_scope=scope)
    for seed in range(3):
        give(params, seed)
        give(others, seed)
        opt.step()
        plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=COMPILED_RTOL, atol=1e-6)


def test_cleaning_happens_in_the_update():
    params, others = parameters(), parameters()
    opt = compiled(torch.optim.SGD(params, lr=0.1), nonfinite="zero")
    plain = GuardedOptimizer(torch.optim.SGD(others, lr=0.1), max_norm=1.0, nonfinite="zero")
    give(params, 0, NAN)
    give(others, 0, NAN)
    opt.step()
    plain.step()
    assert params[0].grad.isnan().any()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=COMPILED_RTOL, atol=1e-6)
