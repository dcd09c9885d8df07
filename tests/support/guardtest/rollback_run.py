"""A small training run with `Rollback`, whose batches depend only on their number."""

from __future__ import annotations

import torch

from fastguard import GuardedLR, GuardedOptimizer, Rollback, SpikeRule


class Run:
    def __init__(self, **rollback) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Dropout(),
            torch.nn.Linear(8, 1),
        )
        self.opt = GuardedOptimizer(
            torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True),
            spike={"loss": SpikeRule(window=4, warmup=4, action="record")},
        )
        self.lr = GuardedLR(self.opt)
        self.ema = torch.nn.Linear(2, 1)
        objects = {"model": self.model, "ema": self.ema}
        self.rollback = Rollback(self.opt, objects, lr=self.lr, **rollback)

    def batch(self, i: int, scale: float = 1.0):
        generator = torch.Generator().manual_seed(i)
        loss = self.model(torch.randn(6, 4, generator=generator)).square().mean() * scale
        self.opt.zero_grad()
        loss.backward()
        self.opt.step(loss=loss, tag=i)
        self.lr.step()
        return self.rollback.step(position=i)

    def state(self) -> list[torch.Tensor]:
        tensors = [*self.model.state_dict().values()]
        for entry in self.opt.state_dict()["state"].values():
            tensors += entry.values()
        return [t.clone() for t in tensors]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))
