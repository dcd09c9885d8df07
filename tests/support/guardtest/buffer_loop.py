"""A training loop around one module with buffers, whose batches depend only on their number."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastguard import GuardedOptimizer


class Loop:
    def __init__(self, middle: nn.Module, fused: bool = True, **guard) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), middle, nn.Linear(4, 1))
        if any(nn.parameter.is_lazy(t) for t in middle.buffers()):
            self.model(torch.ones(2, 4))
        parameters = self.model.parameters()
        self.opt = GuardedOptimizer(torch.optim.AdamW(parameters, fused=fused), **guard)

    def batch(self, i: int, bad: bool = False) -> None:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
        if bad:
            x[0, 1] = math.nan
        self.opt.zero_grad()
        loss = self.model(x).square().mean()
        loss.backward()
        self.opt.step(loss=loss)

    def evaluation(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            found = self.model(torch.ones(2, 4))
        self.model.train()
        return found


def buffers_of(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))
