"""`compile_step=True` on a GPU skips without waiting, and works in a CUDA graph."""

import math
from functools import partial

import pytest
import torch

from fastguard import GuardedOptimizer
from guardtest.compiled import assert_same_bits, compiled, tensors_of
from guardtest.graphs import captured

SIZES = [5, 4097, 70_000]
MAKE = {
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
}
NAN = math.nan


def parameters_of():
    parameters = [torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in SIZES]
    for p in parameters:
        p.grad = torch.ones_like(p)
    return parameters


def fill(parameters, value):
    for p in parameters:
        p.grad.fill_(value)


@pytest.mark.parametrize("name", MAKE)
def test_a_compiled_step_skips_without_waiting(name, no_sync):
    parameters, others = parameters_of(), parameters_of()
    opt = compiled(MAKE[name](parameters))
    plain = GuardedOptimizer(MAKE[name](others), max_norm=1.0)
    assert opt.sync_free and not plain.sync_free
    for some, o in ((parameters, opt), (others, plain)):
        fill(some, NAN)
        o.step()  # compiles
    for value in (1.0, NAN, NAN, 2.0, -3.0):
        fill(parameters, value)
        before = tensors_of(opt.optimizer)
        with no_sync():
            opt.step()
            opt.param_groups[0]["lr"] *= 0.9  # as a scheduler does
        if math.isnan(value):
            assert_same_bits(
                {k: v.cpu() for k, v in before.items()},
                {k: v.cpu() for k, v in tensors_of(opt.optimizer).items()},
            )
        fill(others, value)
        plain.step()
        plain.param_groups[0]["lr"] *= 0.9
    assert opt.skipped_steps == plain.skipped_steps == 3
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_a_whole_step_in_a_graph(name):
    parameters, others = parameters_of(), parameters_of()
    opt, twin = compiled(MAKE[name](parameters)), compiled(MAKE[name](others))
    opt.step()
    twin.step()
    graph, _ = captured(opt.step)
    with torch.no_grad():  # undoes the changes of the warm-up before the capture
        state = [{k: v.clone() for k, v in opt.state[p].items()} for p in parameters]
        for p, q, of_p in zip(parameters, others, state, strict=True):
            q.copy_(p)
            twin.state[q].update(of_p)
    for value in (3.0, NAN, 0.5, NAN, NAN, 1.0):
        fill(parameters, value)
        fill(others, value)
        graph.replay()
        twin.step()
        assert_same_bits(
            {k: v.cpu() for k, v in tensors_of(opt.optimizer).items()},
            {k: v.cpu() for k, v in tensors_of(twin.optimizer).items()},
        )
