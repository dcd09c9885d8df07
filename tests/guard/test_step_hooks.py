"""Hooks for all optimizers run once a step, whatever becomes of it; the guard's own around it."""

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fastguard import GuardedOptimizer
from guardtest.training import give_gradients, new_parameters, poison


@pytest.fixture
def seen():
    order = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: order.append(("pre", type(o).__name__))),
        register_optimizer_step_post_hook(lambda o, *_: order.append(("post", type(o).__name__))),
    ]
    yield order
    for handle in handles:
        handle.remove()


INNER = {
    "fused": lambda ps: torch.optim.AdamW(ps, fused=True),
    "plain": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "LBFGS": lambda ps: torch.optim.LBFGS(ps, max_iter=2),
}


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("kind", INNER)
def test_hooks_of_all_optimizers_run_once_a_step(kind, scheduled, seen):
    parameters = new_parameters()
    inner = INNER[kind](parameters)
    if scheduled:  # which puts a `step` on the instance
        torch.optim.lr_scheduler.ConstantLR(inner)
    opt = GuardedOptimizer(inner)
    once = [("pre", type(inner).__name__), ("post", type(inner).__name__)]
    for step, bad in enumerate(["", "gradient", "loss", ""]):

        def closure(step=step, bad=bad):
            give_gradients(parameters, step)
            if bad == "gradient":
                poison(parameters)
            return torch.tensor(float("nan") if bad == "loss" else 1.0)

        opt.step(closure)
        assert seen == once, bad
        seen.clear()
    assert (opt.applied_steps, opt.skipped_steps) == (2, 2)


def test_without_a_guard_they_run_as_ever(seen):
    parameters = new_parameters()
    inner = torch.optim.SGD(parameters, lr=0.1)
    give_gradients(parameters, 0)
    GuardedOptimizer(inner)
    inner.step()
    assert seen == [("pre", "SGD"), ("post", "SGD")]


def test_a_pre_hook_that_returns_what_is_no_pair_is_refused_before_the_step():
    parameters = new_parameters()
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.1))
    give_gradients(parameters, 0)
    opt.register_step_pre_hook(lambda *_: "nothing")
    with pytest.raises(RuntimeError, match=r"must return None or a tuple.*'nothing'"):
        opt.step()
    assert opt.steps_taken == 0


def test_a_hook_that_fails_leaves_nothing_of_a_scaler_behind():
    parameters = new_parameters()
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.1))
    give_gradients(parameters, 0)

    def fail(*_):
        raise KeyError("hook")

    opt.register_step_pre_hook(fail)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(KeyError):
        opt.step()
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
