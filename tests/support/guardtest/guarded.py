"""Guarded optimizers and helpers that take one step, several, or a whole run."""

import torch

from fastguard import GuardedOptimizer, SpikeRule
from guardtest.training import give_gradients, new_parameters, poison

SPIKES = {"grad_norm": SpikeRule(window=6, warmup=3), "loss": SpikeRule(window=4, warmup=2)}


def sgd(parameters, **options):
    """SGD with learning rate 1, so that the update is the gradient."""
    return GuardedOptimizer(torch.optim.SGD(parameters, lr=1.0), **options)


def one(*values, **options):
    """A guard for one zero parameter per gradient."""
    p = torch.nn.Parameter(torch.zeros(len(values)))
    p.grad = torch.tensor(values)
    return p, sgd([p], **options)


def steps_with(opt, p, norms, loss=None):
    for norm in norms:
        p.grad = torch.tensor([float(norm)])
        opt.step(loss=loss)
    return opt.records()


def adamw(parameters=None, fused=True, **options):
    inner = torch.optim.AdamW(parameters or new_parameters(), lr=0.1, fused=fused)
    return GuardedOptimizer(inner, **options)


def parameters_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def train(opt, steps, bad=(), loss=True):
    for step in steps:
        give_gradients(parameters_of(opt), step)
        if step in bad:
            poison(parameters_of(opt))
        opt.step(loss=1.0 + step % 3 if loss else None)
