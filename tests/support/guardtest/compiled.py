"""The optimizers for tests of `compile_step=True`, and shared code of these tests."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard import GuardedOptimizer

SHAPES = ((6, 5), (7,))
MATRICES = ((9, 6), (6, 6))

OPTIMIZERS = {
    "Adadelta": (partial(torch.optim.Adadelta, lr=0.01), SHAPES),
    "Adafactor": (partial(torch.optim.Adafactor, lr=0.01), SHAPES),
    "Adagrad": (partial(torch.optim.Adagrad, lr=0.01), SHAPES),
    "Adam": (partial(torch.optim.Adam, lr=0.01, amsgrad=True), SHAPES),
    "AdamW": (partial(torch.optim.AdamW, lr=0.01), SHAPES),
    "Adamax": (partial(torch.optim.Adamax, lr=0.01), SHAPES),
    "ASGD": (partial(torch.optim.ASGD, lr=0.01), SHAPES),
    "NAdam": (partial(torch.optim.NAdam, lr=0.01), SHAPES),
    "RAdam": (partial(torch.optim.RAdam, lr=0.01), SHAPES),
    "RMSprop": (partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True), SHAPES),
    "Rprop": (partial(torch.optim.Rprop, lr=0.01), SHAPES),
    "SGD": (partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True), SHAPES),
}

if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["Muon"] = (partial(torch.optim.Muon, lr=0.01), MATRICES)


def parameters(shapes=SHAPES) -> list[torch.nn.Parameter]:
    """New parameters, equal at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give(params, seed: int, value: float | None = None) -> None:
    """Sets new gradients; if given, `value` replaces one element of each tensor."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if value is not None:
            p.grad.view(-1)[1] = value


def compiled(inner: Optimizer, **options) -> GuardedOptimizer:
    return GuardedOptimizer(inner, **{"max_norm": 1.0, "compile_step": True} | options)


def tensors_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of weights, state and tensor settings, by name."""
    found: dict[str, Tensor] = {}
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor):
                found[f"group {i}: {key}"] = value.detach().clone()
        for j, p in enumerate(group["params"]):
            found[f"{i}.{j}"] = p.detach().clone()
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    found[f"{i}.{j}: {key}"] = value.clone()
    return found


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert (
            x.contiguous()
            .view(-1)
            .view(torch.uint8)
            .equal(y.contiguous().view(-1).view(torch.uint8))
        ), name
