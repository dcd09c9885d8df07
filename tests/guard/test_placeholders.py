"""Estimates of memory: a guard is made and steps under FakeTensorMode, as the bare optimizer."""

import pytest
import torch
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fastguard

OPTIMIZERS = {
    "SGD": lambda ps: optim.SGD(ps, lr=0.1),
    "fused SGD with momentum": lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda ps: optim.AdamW(ps),
    "foreach AdamW": lambda ps: optim.AdamW(ps, foreach=True),
    "fused AdamW": lambda ps: optim.AdamW(ps, fused=True),
    "NAdam": lambda ps: optim.NAdam(ps),
}
GUARDS = {
    "default": {},
    "clip": {"max_norm": 1.0},
    "zero": {"nonfinite": "zero", "norm_type": float("inf")},
    "raise": {"nonfinite": "raise"},
    "propagate": {"nonfinite": "propagate", "max_norm": 1.0},
    "rules": {
        "spike": {"grad_norm": fastguard.SpikeRule(), "loss": fastguard.Threshold(max=100.0)},
        "max_consecutive_skips": 3,
    },
    "group": {"clip_scope": "group", "max_norm": 1.0},
    "tensor": {"clip_scope": "tensor", "max_norm": 1.0},
    "flat": {"flat_buckets": True, "max_norm": 1.0},
}


def train(make, guard, steps=3):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    opt = fastguard.GuardedOptimizer(
        make(model.parameters()), named_parameters=model.named_parameters(), **guard
    )
    for _ in range(steps):
        opt.zero_grad()
        loss = model(torch.randn(3, 4)).square().mean()
        loss.backward()
        opt.step(loss=loss)
    opt.load_state_dict(opt.state_dict())
    return model, opt


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_steps_of_placeholders_are_taken_and_leave_no_record(make, guard):
    with FakeTensorMode():
        _, opt = train(OPTIMIZERS[make], GUARDS[guard])
        assert opt.records() == [] and opt.flush() == []
        if make != "SGD":
            assert len(opt.state) == 4  # each parameter has stepped
    _, real = train(OPTIMIZERS[make], GUARDS[guard])
    assert real.applied_steps == 3 and len(real.records()) == 3


def test_layers_around_several_gradients_are_refused_by_name():
    p = nn.Parameter(TwoTensor(torch.zeros(2), torch.zeros(2)))
    opt = fastguard.GuardedOptimizer(optim.SGD([p], lr=0.1))
    p.grad = TwoTensor(torch.ones(2), torch.full((2,), float("nan")))
    with pytest.raises(TypeError, match=r"type TwoTensor.*no one decision"):
        opt.step()
    assert p.a.tolist() == [0, 0] and opt.steps_taken == 0
