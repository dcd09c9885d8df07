"""Implementations that are not fused, with capturable=True, which torch accepts only on a GPU."""

import inspect

import pytest
import torch

from fastguard import GuardedOptimizer
from guardtest.training import (
    SPECIAL,
    assert_same_bits,
    give_gradients,
    optimizer_classes,
    parameters_for,
    poison,
    snapshot,
)

CLASSES = [
    cls
    for cls in optimizer_classes()
    if cls not in SPECIAL and "capturable" in inspect.signature(cls).parameters
]
BAD = {0, 3, 4}


def parameters_on_gpu(cls):
    return [torch.nn.Parameter(p.detach().cuda()) for p in parameters_for(cls)]


def give_gradients_on_gpu(parameters, step):
    cpu = [p.detach().cpu() for p in parameters]
    give_gradients(cpu, step)
    for p, like in zip(parameters, cpu, strict=True):
        p.grad = like.grad.cuda()


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_skipped_step_changes_nothing(cls, foreach):
    parameters, alone_parameters = parameters_on_gpu(cls), parameters_on_gpu(cls)
    opt = GuardedOptimizer(cls(parameters, foreach=foreach, capturable=True))
    alone = cls(alone_parameters, foreach=foreach, capturable=True)
    assert not opt.sync_free
    for step in range(6):
        give_gradients_on_gpu(parameters, step)
        if step in BAD:
            poison(parameters)
        before = snapshot(opt)
        opt.step()
        if step in BAD:
            assert_same_bits(snapshot(opt), before)
        else:
            give_gradients_on_gpu(alone_parameters, step)
            alone.step()
    assert_same_bits(snapshot(opt), snapshot(alone))
    assert (opt.applied_steps, opt.skipped_steps) == (3, 3)
