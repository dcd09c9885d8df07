"""An optimizer with flat parameters, compared with torch's own."""

import torch
from torch import nn

from fastguard import GuardedOptimizer
from guardtest.training import new_parameters

SHAPES = ((3, 4), (5,), (2, 3, 2), (), (0,), (7, 9), (1,))
# Fused kernels round the last elements of a tensor differently if they do not fill a vector.
CLOSE = {"rtol": 2e-6, "atol": 1e-7}

KINDS = {
    "adamw": (torch.optim.AdamW, {"lr": 0.1}),
    "adamw_amsgrad": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 1}),
}


class Pair:
    """An optimizer with flat parameters and torch's own, stepped with the same gradients.

    Args:
        make: Creates an optimizer from parameters.
        options: Arguments of the guard.
    """

    def __init__(self, make, dtype=torch.float32, shapes=SHAPES, **options):
        self.ours, self.theirs = (new_parameters(shapes, dtype) for _ in range(2))
        self.plain = make(self.theirs)
        self.opt = GuardedOptimizer(make(self.ours), flat_parameters=True, **options)
        self.max_norm = options.get("max_norm")

    def step(self, number, without=(), **kwargs):
        generator = torch.Generator().manual_seed(number)
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad, q.grad = (None, None) if i in without else (grad.clone(), grad.clone())
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.theirs, self.max_norm)
        self.opt.step(**kwargs)
        self.plain.step()

    def assert_same(self, close=CLOSE):
        for p, q in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(p, q, **close)
            mine, others = self.opt.state.get(p, {}), self.plain.state.get(q, {})
            assert mine.keys() == others.keys()
            for key, value in others.items():
                assert mine[key].shape == value.shape and mine[key].dtype == value.dtype
                torch.testing.assert_close(mine[key], value, **close)


def in_one_buffer(tensors):
    return len({t.untyped_storage().data_ptr() for t in tensors if t.numel()}) == 1


def pair_of(kind, fused=True, **options):
    cls, settings = KINDS[kind]
    return Pair(lambda parameters: cls(parameters, fused=fused, **settings), **options)
