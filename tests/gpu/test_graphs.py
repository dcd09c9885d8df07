"""CUDA graphs that contain a call of a clipping function or a whole guarded step."""

import math

import pytest
import torch

import fastguard
from fastguard import GuardedOptimizer, SpikeRule, Threshold
from guardtest.graphs import captured

SIZES = [5, 4097, 70_000]


def parameters_of(value=1.0):
    parameters = [torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in SIZES]
    for p in parameters:
        p.grad = torch.full_like(p, value)
    return parameters


def fill(parameters, values):
    """Writes into the existing gradients, because a graph uses their addresses."""
    for p, value in zip(parameters, values, strict=True):
        p.grad.fill_(value)


def guarded(parameters, **options):
    """Guards an optimizer that has its state already; a graph would create it at each replay."""
    inner = torch.optim.AdamW(parameters, lr=0.01, fused=True, capturable=True)
    inner.step()
    return GuardedOptimizer(inner, max_norm=1.0, **options)


ROUNDS = [(1.0, 1.0, 1.0), (3.0, 0.5, 2.0), (0.0, 0.0, 1e-5), (1.0, math.nan, 1.0), (1.0, 1.0, 1.0)]


@pytest.mark.parametrize("mode", ["propagate", "zero"])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 3.0], ids=str)
def test_clipping_in_a_graph(mode, norm_type):
    parameters, others = parameters_of(), parameters_of()

    def clip(some):
        return fastguard.clip_grad_norm_(some, 1.0, norm_type, nonfinite=mode)

    graph, norm = captured(lambda: clip(parameters))
    for values in ROUNDS:
        fill(parameters, values)
        fill(others, values)
        graph.replay()
        torch.testing.assert_close(norm, clip(others), rtol=0, atol=0, equal_nan=True)
        for p, other in zip(parameters, others, strict=True):
            torch.testing.assert_close(p.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_flat_buckets_clip_in_a_graph():
    parameters = parameters_of()
    flat = fastguard.FlatGradBuckets(parameters)
    graph, norm = captured(lambda: flat.clip_grad_norm_(1.0))
    for values in ROUNDS[:2]:
        fill(parameters, values)
        want = torch.cat([p.grad for p in parameters]).double().norm()
        graph.replay()
        torch.testing.assert_close(norm.double(), want, rtol=1e-6, atol=0)
        assert torch.cat([p.grad for p in parameters]).norm().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("kind", ["cuda", "float", "none"])
def test_guarded_steps_in_a_graph_equal_steps_without_one(kind):
    """Losses, rules and skips give bitwise equal weights, counters and baselines."""
    loss = {"cuda": torch.ones((), device="cuda"), "float": 0.5, "none": None}[kind]
    rules = {"grad_norm": SpikeRule(window=8, warmup=2), "loss": Threshold(max=50.0)}
    parameters, others = parameters_of(), parameters_of()
    opt, eager = guarded(parameters, spike=rules), guarded(others, spike=rules)

    graph, _ = captured(lambda: opt.step(loss=loss))
    eager.step(loss=loss)  # as many steps as `opt` takes, because a capture runs nothing
    for values in ROUNDS:
        fill(parameters, values)
        fill(others, values)
        graph.replay()
        eager.step(loss=loss)
    # The second round is a spike, and the fourth contains a NaN.
    assert (opt.applied_steps, opt.skipped_steps) == (4, 2)
    assert (eager.applied_steps, eager.skipped_steps) == (4, 2)
    assert torch.equal(opt.last.total_norm, eager.last.total_norm)
    for p, other in zip(parameters, others, strict=True):
        assert torch.equal(p, other)
    saved, expected = opt.state_dict()["fastguard"], eager.state_dict()["fastguard"]
    assert str(saved) == str(expected)


def test_a_loss_on_the_device_reaches_the_replays():
    parameters = parameters_of()
    opt = guarded(parameters, spike={"loss": Threshold(max=50.0)})
    loss = torch.ones((), device="cuda")
    graph, _ = captured(lambda: opt.step(loss=loss))
    for value in (1.0, 60.0, math.nan, 1.0):
        loss.fill_(value)
        graph.replay()
    assert (opt.applied_steps, opt.skipped_steps) == (3, 2)


def test_tables_of_a_captured_first_step_are_not_used_before_they_are_filled():
    """The graph fills its tables when it runs, so a step that runs before needs other tables."""
    rules = {"grad_norm": Threshold(max=1e6)}
    guarded(parameters_of(), spike=rules).step()  # compiles the kernels before the capture
    parameters = parameters_of()
    opt = guarded(parameters, spike={"grad_norm": Threshold(max=1234.5)})
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    fill(parameters, (100.0,) * 3)
    opt.step()
    assert (opt.applied_steps, opt.skipped_steps) == (0, 1)
    fill(parameters, (1.0,) * 3)
    graph.replay()
    opt.step()
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)


def test_records_of_eager_steps_continue_next_to_a_graph():
    parameters = parameters_of()
    opt = guarded(parameters)
    graph, _ = captured(opt.step)
    graph.replay()
    opt.step()
    assert [r.step for r in opt.flush()] == [1, 3]  # a replay is counted but has no record
