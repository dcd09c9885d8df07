"""The optimizers of popular packages, and a training run that uses one of them."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard import GuardedOptimizer
from fastguard.gradients.tensor_parts import parts_of
from guardtest import require

PACKAGES = (
    "timm.optim",
    "torch_optimizer",
    "schedulefree",
    "pytorch_optimizer",
    "torchao.optim",
    "transformers.optimization",
)

# These need more than `step()`, or other hardware.
LEFT_OUT = {
    "schedulefree.AdamWScheduleFreeClosure": "evaluates a closure in the middle of its step",
    "schedulefree.RAdamScheduleFreeClosure": "evaluates a closure in the middle of its step",
    "schedulefree.SGDScheduleFreeClosure": "evaluates a closure in the middle of its step",
    "pytorch_optimizer.AliG": "evaluates a closure in the middle of its step",
    "pytorch_optimizer.BSAM": "evaluates a closure in the middle of its step",
    "pytorch_optimizer.FriendlySAM": "evaluates a closure in the middle of its step",
    "pytorch_optimizer.GSAM": "evaluates a closure in the middle of its step",
    "pytorch_optimizer.LookSAM": "evaluates a closure in the middle of its step",
    "pytorch_optimizer.SAM": "evaluates a closure in the middle of its step",
    "pytorch_optimizer.WSAM": "evaluates a closure in the middle of its step",
    "pytorch_optimizer.AdaLOMO": "updates weights in the backward pass",
    "pytorch_optimizer.LOMO": "updates weights in the backward pass",
    "pytorch_optimizer.DeMo": "compresses gradients between ranks, with einops",
    "pytorch_optimizer.DistributedMuon": "gathers over a process group",
    "torchao.optim.CPUOffloadOptimizer": "needs a GPU",
    "transformers.optimization.LayerWiseDummyOptimizer": "its step does nothing",
}
REFUSED = {"pytorch_optimizer.SafeFP16Optimizer": "has no param_groups"}
NEED_GRAPH = {
    "timm.optim.Adahessian",
    "torch_optimizer.Adahessian",
    "pytorch_optimizer.AdaHessian",
    "pytorch_optimizer.SophiaH",
}


class Model(nn.Module):
    """Two layers, small enough for 200 optimizers. State is quantized from 4096 elements on."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(width, width)
        self.last = nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.wide(x)))


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


Maker = Callable[[type, nn.Module], Any]
MAKERS: tuple[Maker, ...] = (
    lambda cls, model: cls(model.parameters()),
    lambda cls, model: cls(model.parameters(), lr=1e-2),
    lambda cls, model: cls(adamw(model)),
    lambda cls, model: cls(muon_groups(model)),
    lambda cls, model: cls(model.parameters(), num_iterations=20),
    lambda cls, model: cls(model),
    lambda cls, model: cls([p for p in model.parameters() if p.dim() == 2]),
)


@functools.cache
def optimizers() -> dict[str, type]:
    """All optimizers of the packages by package and name, without torch's own."""
    found: dict[str, type] = {}
    for package in PACKAGES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = require(package)
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer:
                if not f"{cls.__module__}.".startswith("torch."):
                    found.setdefault(f"{package}.{name}", cls)
    return found


def driven() -> list[str]:
    """The names of the optimizers that `step()` alone drives."""
    return sorted(set(optimizers()) - set(LEFT_OUT) - set(REFUSED))


class Run:
    """A model and its optimizer, guarded or bare.

    Args:
        name: Name of the optimizer.
        guarded: Whether it is guarded.
        how: The entry of `MAKERS` that constructs it.
        options: Arguments of the guard.
    """

    def __init__(self, name: str, guarded: bool, how: Maker, **options: Any) -> None:
        self.model = Model(width=64 if name.startswith("torchao") else 12)
        self.graph = name in NEED_GRAPH
        inner = how(optimizers()[name], self.model)
        self.opt = GuardedOptimizer(inner, **options) if guarded else inner
        self.inner = inner
        if hasattr(self.opt, "train"):
            self.opt.train()

    def step(self, *steps: int, bad: bool = False) -> None:
        for step in steps:
            torch.manual_seed(step)  # some optimizers use random numbers
            x = torch.randn(8, self.model.wide.in_features)
            loss = self.model(x).square().mean()
            loss.backward(create_graph=self.graph)
            if bad:
                self.model.wide.weight.grad.data[0, 0] = float("nan")
            self.opt.step()
            self.opt.zero_grad()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def state(self) -> Any:
        return values(self.inner.state_dict())


def values(state: Any) -> Any:
    """A copy of a state in plain containers, which `==` can compare."""
    if isinstance(state, Tensor) and (parts := parts_of(state)) is not None:
        return values(dict(parts.tensors))
    if isinstance(state, Tensor):
        raw = state.detach().contiguous().view(-1).view(torch.uint8).tolist()
        return (str(state.dtype), tuple(state.shape), raw)
    if isinstance(state, dict):
        return {str(key): values(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [values(value) for value in state]
    return state if isinstance(state, int | float | str | bool) else type(state).__name__


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def maker_of(name: str) -> Maker:
    """The first entry of `MAKERS` whose optimizer can take two steps."""
    errors = []
    for how in MAKERS:
        try:
            Run(name, guarded=False, how=how).step(0, 1)
            return how
        except Exception as error:
            errors.append(repr(error))
    pytest.fail(f"none of MAKERS constructs {name}: {errors}")
