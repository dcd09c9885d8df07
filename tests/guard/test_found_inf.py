"""Some optimizers declare support for `found_inf` but do more in a step than the kernel."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from fastguard import GuardedOptimizer
from fastguard.guard.found_inf import reads_found_inf
from guardtest.guarded import parameters_of
from guardtest.training import assert_same_bits, give_gradients, new_parameters, poison, snapshot


class Passes(torch.optim.Optimizer):
    """Forwards all attributes of the optimizer inside, as many wrappers do."""

    def __init__(self, inside):
        self.__dict__["inside"] = inside

    def __getattr__(self, name):
        return getattr(self.__dict__["inside"], name)

    def step(self, closure=None):
        return self.inside.step(closure)


class Shrinks(torch.optim.AdamW):
    """Changes weights after the fused step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in parameters_of(self):
            p.mul_(0.9)


class Named(torch.optim.AdamW):
    """An optimizer with another name but the same step."""


class OwnKernel(torch.optim.Optimizer):
    """An optimizer that does not derive from torch's, with its own support for `found_inf`."""

    _step_supports_amp_scaling = True

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "fused": True})

    @torch.no_grad()
    def step(self, closure=None):
        for p in parameters_of(self):
            p.copy_(torch.where(self.found_inf == 1, p, p - 0.1 * p.grad))


def fused(cls, **settings):
    return cls(new_parameters(), fused=True, **settings)


MADE = {
    "passes": (lambda: Passes(fused(torch.optim.AdamW)), False),
    "shrinks": (lambda: fused(Shrinks), False),
    "named": (lambda: fused(Named), True),
    "own kernel": (lambda: OwnKernel(new_parameters()), True),
    "torch": (lambda: fused(torch.optim.SGD, lr=0.1), True),
    "not fused": (lambda: torch.optim.AdamW(new_parameters()), False),
}


@pytest.mark.parametrize("name", MADE)
def test_a_skipped_step_changes_nothing(name):
    make, obeys = MADE[name]
    inner = make()
    LambdaLR(inner, lambda step: 1.0)  # wraps the step of the instance
    assert reads_found_inf(inner) is obeys
    opt = GuardedOptimizer(inner)
    assert ("found_inf" in opt.describe()) is obeys
    give_gradients(parameters_of(opt), 0)
    opt.step()
    before = snapshot(opt)
    give_gradients(parameters_of(opt), 1)
    poison(parameters_of(opt))
    opt.step()
    assert_same_bits(snapshot(opt), before)
    assert (opt.applied_steps, opt.skipped_steps) == (1, 1)
