"""Adaptive gradient clipping on a GPU agrees with float64, does not wait, and works in a graph."""

import math

import pytest
import torch

import fastguard
import fastguard.optim as fused
from fastguard import AGC, GuardedOptimizer
from guardtest.agc import assert_clipped, expected, parameters

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def on_gpu(dtype=torch.float32, seed=0):
    ps = [torch.nn.Parameter(p.detach().cuda()) for p in parameters(dtype, seed=seed)]
    give(ps, dtype, seed)
    return ps


def give(ps, dtype=torch.float32, seed=0):
    for p, source in zip(ps, parameters(dtype, seed=seed), strict=True):
        p.grad = source.grad.cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 3.5, math.inf])
def test_the_function(dtype, norm_type):
    ps, host = on_gpu(dtype), parameters(dtype)
    wanted = [expected(p.grad, p, p=norm_type) for p in host]
    fastguard.clip_grad_adaptive_(ps, norm_type=norm_type)
    assert_clipped([p.grad.cpu() for p in ps], wanted)


def guarded(ps, kind=torch.optim.AdamW):
    options = {"fused": True} if kind is torch.optim.AdamW else {}
    return GuardedOptimizer(kind(ps, lr=0.01, **options), max_norm=AGC(), clip_scope="unit")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, fused.AdamW], ids=["torch", "in the update"])
def test_a_step_does_not_wait(no_sync, kind):
    ps = on_gpu()
    opt = guarded(ps, kind)
    opt.step()
    with no_sync():
        for step in range(4):
            give(ps, seed=step)
            if step == 2:
                ps[4].grad.fill_(math.nan)
            opt.step()
    records = opt.flush()
    assert [r.action for r in records] == ["clipped"] * 3 + ["skipped", "clipped"]
    on_host = GuardedOptimizer(torch.optim.SGD(parameters()), max_norm=AGC(), clip_scope="unit")
    on_host.step()
    (expected_record,) = on_host.records()
    for name in ("clipped_units", "limited_units", "most_clipped_unit"):
        assert getattr(records[0], name) == getattr(expected_record, name)
    assert records[3].limited_units == 0


def test_a_skipped_step_does_not_change_gradients():
    ps = on_gpu()
    opt = guarded(ps)
    ps[4].grad[0, 0] = math.nan
    before = [p.grad.clone() for p in ps]
    opt.step()
    for p, grad in zip(ps, before, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0, equal_nan=True)


def test_a_graph_clips_new_gradients():
    ps = [p for p in on_gpu() if p.numel()]
    fastguard.clip_grad_adaptive_(ps)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastguard.clip_grad_adaptive_(ps)
    for seed in (1, 2):
        fresh = [p for p in parameters(seed=seed) if p.numel()]
        wanted = []
        for p, source in zip(ps, fresh, strict=True):
            p.grad.copy_(source.grad)
            wanted.append(expected(source.grad, p.detach().cpu()))
        graph.replay()
        assert_clipped([p.grad.cpu() for p in ps], wanted)


@pytest.mark.parametrize("shape", [(2048, 512, 1, 1), (512, 512, 3, 3), (64, 3, 7, 7)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolutions(shape, layout):
    p = torch.nn.Parameter(torch.randn(shape, device="cuda"))
    p.grad = torch.randn_like(p).contiguous(memory_format=layout)
    wanted = expected(p.grad.cpu(), p.detach().cpu())
    fastguard.clip_grad_adaptive_(p)
    assert_clipped([p.grad.cpu()], [wanted])
