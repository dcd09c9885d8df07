"""A compiled train step with `opt.step()`, where the guard breaks the graph once."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastguard
from fastguard import GuardedOptimizer
from guardtest.training import assert_same_bits, snapshot


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step, bad=()):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    if step in bad:
        x[0, 0] = float("nan")
    return x


def train_step(model, opt, guarded):
    def step(x):
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if guarded:
            opt.step(loss=loss)
        else:
            opt.step()
        return loss

    return step


def run(guarded, compiled, steps, *, fused=True, bad=(), change=None, **options):
    model = model_of()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    opt = GuardedOptimizer(inner, **options) if guarded else inner
    step = train_step(model, opt, guarded)
    counter = CompileCounter()
    if compiled:
        step = torch.compile(step, backend=counter)
    graphs = []
    for i in range(steps):
        if change is not None:
            change(opt, i)
        step(batch(i, bad))
        graphs.append(counter.frame_count)
    return opt, graphs


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_compiled_equals_eager_including_skips(fused, flat):
    bad = {0, 3, 4}
    options = {"fused": fused, "bad": bad, "max_norm": 0.5, "flat_buckets": flat}
    eager, _ = run(True, False, 7, **options)
    compiled, graphs = run(True, True, 7, **options)
    assert graphs[-1] > 0  # something was compiled
    assert (compiled.applied_steps, compiled.skipped_steps) == (4, 3)
    assert_same_bits(snapshot(compiled), snapshot(eager))
    actions = [r.action == "skipped" for r in compiled.records()]
    assert actions == [step in bad for step in range(7)]


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
def test_no_more_graphs_than_with_the_bare_optimizer(fused):
    _, bare = run(False, True, 4, fused=fused)
    torch._dynamo.reset()
    _, guarded = run(True, True, 4, fused=fused, max_norm=1.0)
    assert 0 < guarded[-1] <= bare[-1]


@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": fastguard.ZClip(warmup=3, max_norm=None)},
        {"max_norm": fastguard.AutoClip(window=4)},
        {"max_norm": fastguard.AdaGC(warmup=3), "clip_scope": "tensor"},
    ],
    ids=lambda options: type(options["max_norm"]).__name__,
)
def test_an_adaptive_limit_equals_eager_and_needs_no_further_graph(options):
    eager, _ = run(True, False, 8, bad=(4,), **options)
    compiled, graphs = run(True, True, 8, bad=(4,), **options)
    assert torch.equal(eager._state.limits, compiled._state.limits)
    assert_same_bits(snapshot(compiled), snapshot(eager))
    torch._dynamo.reset()
    assert graphs == run(True, True, 8, bad=(4,), **options | {"max_norm": 1.0})[1]


def test_nothing_recompiles_when_lr_or_max_norm_change():
    def change(opt, step):
        for group in opt.param_groups:
            group["lr"] = 0.1 / (1 + step)
        opt.max_norm = 1.0 / (1 + step)

    opt, graphs = run(True, True, 8, max_norm=1.0, change=change)
    assert graphs[2:] == [graphs[2]] * 6
    assert len({r.lr for r in opt.records()}) == 8


def test_a_compiled_optimizer_step_without_the_training_step():
    model = model_of()
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), fused=True), max_norm=1.0)
    step = torch.compile(opt.step, backend=CompileCounter())
    for i in range(3):
        opt.zero_grad()
        model(batch(i, {1})).sum().backward()
        before = snapshot(opt)
        step()
        if i == 1:
            assert_same_bits(snapshot(opt), before)
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)


@pytest.mark.slow
def test_generated_code_trains_through_a_bad_batch():
    """Uses the real compiler, not only the tracer."""
    model = model_of()
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), fused=True), max_norm=1.0)
    step = torch.compile(train_step(model, opt, True))
    for i in range(4):
        step(batch(i, {2}))
    assert [r.action == "skipped" for r in opt.records()] == [False, False, True, False]
    assert all(p.isfinite().all() for p in model.parameters())
