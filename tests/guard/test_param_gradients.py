"""The gradients of an optimizer, and the device of the decision."""

import pytest
import torch
import torch.distributed as dist

from fastguard import GuardedOptimizer
from fastguard.guard.param_gradients import Gradients
from guardtest.gloo_groups import group_of_one


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_results_are_on_the_device_of_the_first_parameter_even_without_gradient(flat):
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    gradients = Gradients(torch.optim.SGD([frozen, p], lr=1.0), "global", {}, 2.0, flat)
    p.grad = torch.ones(2, device="meta")
    gradients._seen = True  # the meta device serves as a second device here
    assert gradients.buckets().device == gradients.device == frozen.device


def test_a_rank_without_parameters_may_be_the_only_one_in_its_group():
    with group_of_one():
        inner = torch.optim.SGD([{"params": []}], lr=1.0)
        opt = GuardedOptimizer(inner, max_norm=1.0, group=dist.group.WORLD)
        opt.step(loss=1.0)
        assert opt.applied_steps == 1 and opt.records()[0].total_norm == 0.0


def test_unchanged_parameters_are_compared_as_lists_from_the_first_step_on(monkeypatch):
    """Comparing lists takes 0.001 µs per parameter, and comparing parameters 0.02 µs."""

    def one_by_one(*_):
        raise AssertionError("parameters were compared one by one")

    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (1, 2)]
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=1.0))
    monkeypatch.setattr("fastguard.guard.param_gradients.is_", one_by_one)
    for p in parameters:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.applied_steps == 1
