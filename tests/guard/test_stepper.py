"""The stepper of each optimizer, and when it must read the verdict first."""

import pytest
import torch

from fastguard.guard.on_device import OnDevice
from fastguard.guard.read_first import ReadFirst
from fastguard.guard.stepper import stepper_for
from fastguard.guard.whole_step import WholeStep
from guardtest.training import obeys_found_inf, parameters_for, variants


@pytest.mark.parametrize(
    ("cls", "kwargs"), [pytest.param(cls, kwargs, id=name) for name, cls, kwargs in variants()]
)
def test_only_fused_optimizers_skip_on_the_device(cls, kwargs):
    inner = cls(parameters_for(cls), **kwargs)
    assert type(stepper_for(inner)) is (OnDevice if obeys_found_inf(cls, kwargs) else ReadFirst)


def test_lbfgs_steps_first():
    assert type(stepper_for(torch.optim.LBFGS(parameters_for(torch.optim.LBFGS)))) is WholeStep


def test_a_fused_optimizer_without_support_for_found_inf_reads_first():
    class Own(torch.optim.SGD):
        """Accepts `fused`, as third-party optimizers do, but does not support found_inf."""

    inner = Own(parameters_for(Own), lr=0.1, fused=True)
    del inner._step_supports_amp_scaling
    assert type(stepper_for(inner)) is ReadFirst


def test_the_verdict_is_read_first_when_momentum_buffers_are_created():
    (p, *_) = parameters = parameters_for(torch.optim.SGD)
    inner = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)
    stepper = stepper_for(inner)
    assert isinstance(stepper, OnDevice)
    assert not stepper._creates_momentum()  # no gradient, no buffer
    p.grad = torch.ones_like(p)
    assert stepper._creates_momentum()
    inner.step()
    assert not stepper._creates_momentum()
    inner.param_groups[0]["momentum"] = 0
    inner.state.clear()
    assert not stepper._creates_momentum()


def test_momentum_buffers_are_checked_until_all_exist(monkeypatch):
    (p, q, *_) = parameters = parameters_for(torch.optim.SGD)
    groups = [{"params": [p]}, {"params": [q]}]
    inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True)
    stepper = stepper_for(inner)
    p.grad = torch.ones_like(p)
    inner.step()
    assert not stepper._creates_momentum()
    q.grad = torch.ones_like(q)
    assert stepper._creates_momentum()  # the parameter gets its first gradient later
    inner.step()
    assert not stepper._creates_momentum()
    with monkeypatch.context() as patch:
        patch.setattr("fastguard.guard.on_device.chain", None)
        assert not stepper._creates_momentum()  # the parameters are no longer checked
    inner.load_state_dict(inner.state_dict())
    assert not stepper._creates_momentum()
    inner.add_param_group({"params": parameters[2:3]})
    parameters[2].grad = torch.ones_like(parameters[2])
    assert stepper._creates_momentum()
    inner.step()
    assert not stepper._creates_momentum()
    for values in inner.state.values():
        values["momentum_buffer"] = None
    inner.load_state_dict(inner.state_dict())  # the state of an optimizer that has not stepped yet
    assert stepper._creates_momentum()
