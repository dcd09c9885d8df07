"""Global hooks run once per step, even if it is skipped; the guard's hooks run around it."""

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fastguard import GuardedOptimizer
from fastguard.guard.whole_step import WholeStep
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
def test_global_hooks_run_once_per_step(kind, scheduled, seen):
    parameters = new_parameters()
    inner = INNER[kind](parameters)
    if scheduled:  # sets a `step` on the instance
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


class Perturbs(torch.optim.Optimizer):
    """Evaluates its closure after changing the weights; the first step shows this."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure):
        for p in self.param_groups[0]["params"]:
            p.add_(1e-3)
        loss = closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(1e-3 + 0.1 * p.grad)
        return loss


def test_global_hooks_run_once_in_the_step_that_detects_the_closure(seen):
    parameters = new_parameters()
    others = torch.optim.SGD(new_parameters(), lr=0.1)
    inner = Perturbs(parameters)
    opt = GuardedOptimizer(inner)

    def closure():
        give_gradients(parameters, 0)
        if seen.count(("pre", "SGD")) == 0 and type(opt._stepper) is WholeStep:
            others.step()  # during the second attempt, hooks of other optimizers still run
        return torch.tensor(1.0)

    for _ in range(2):
        give_gradients(parameters, 0)
        opt.step(closure)
        assert sorted(seen) == [(when, kind) for when in ("post", "pre") for kind in KINDS]
        seen.clear()
    assert type(opt._stepper) is WholeStep and opt.applied_steps == 2


KINDS = ("Perturbs", "SGD")


@pytest.mark.parametrize("whose", ["own", "of all"])
@pytest.mark.parametrize("kind", INNER)
def test_a_step_whose_post_hook_fails_counts_if_the_weights_moved(kind, whose):
    """The step of an optimizer that evaluates a closure inside it is undone instead."""
    parameters = new_parameters()
    inner = INNER[kind](parameters)
    opt = GuardedOptimizer(inner)
    start = [p.detach().clone() for p in parameters]

    def closure():
        give_gradients(parameters, 0)
        return torch.tensor(1.0)

    def fail(*_):
        raise KeyError("hook")

    register = (
        inner.register_step_post_hook if whose == "own" else register_optimizer_step_post_hook
    )
    handle = register(fail)
    try:
        with pytest.raises(KeyError, match="hook"):
            opt.step(closure)
    finally:
        handle.remove()
    moved = any(not torch.equal(p, before) for p, before in zip(parameters, start, strict=True))
    assert moved == (kind != "LBFGS")
    assert opt.applied_steps == opt.steps_taken == moved
    assert [r.step for r in opt.records()] == [1] * moved
    assert opt.step(closure) == 1.0 and opt.applied_steps == 1 + moved
    assert not inner._optimizer_step_post_hooks


def test_without_a_guard_global_hooks_run_as_usual(seen):
    parameters = new_parameters()
    inner = torch.optim.SGD(parameters, lr=0.1)
    give_gradients(parameters, 0)
    GuardedOptimizer(inner)
    inner.step()
    assert seen == [("pre", "SGD"), ("post", "SGD")]


def test_an_invalid_result_of_a_pre_hook_is_refused_before_the_step():
    parameters = new_parameters()
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.1))
    give_gradients(parameters, 0)
    opt.register_step_pre_hook(lambda *_: "nothing")
    with pytest.raises(RuntimeError, match=r"must return None or a tuple.*'nothing'"):
        opt.step()
    assert opt.steps_taken == 0


def test_a_failing_hook_leaves_no_scaler_attributes():
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
