"""A small training run with all state that a resume must restore."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

from fastguard import CheckpointStore, GuardedOptimizer, SpikeRule


class LongRun:
    """Dropout and augmentation use the global generators; batches have a separate generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(8, 1),
        )
        self.optimizer = GuardedOptimizer(
            torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True),
            max_norm=1.0,
            spike=SpikeRule(window=4, warmup=3),
        )
        self.scheduler = OneCycleLR(self.optimizer, max_lr=1e-2, total_steps=100)
        self.ema = AveragedModel(self.model, use_buffers=True)
        self.order = torch.Generator().manual_seed(1)
        self.step = 0

    def objects(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "order": self.order,
        }

    def advance(self, to_step: int) -> LongRun:
        while self.step < to_step:
            x = torch.randn(6, 4, generator=self.order)
            x = x * random.uniform(0.9, 1.1) + 0.01 * np.random.randn()
            loss = self.model(x).square().mean()
            if self.step % 5 == 3:
                loss = loss * float("nan")  # skipped by the guard
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step(loss=loss)
            self.scheduler.step()
            self.ema.update_parameters(self.model)
            self.step += 1
        return self

    def save(self, store: CheckpointStore, **more: Any):
        return store.save(self.objects(), step=self.step, position={"batch": self.step}, **more)

    @classmethod
    def resumed(cls, store: CheckpointStore, which: Any = "last-clean") -> LongRun:
        run = cls()
        checkpoint = store.load(which, run.objects())
        assert checkpoint.state == {"position": {"batch": checkpoint.step}}
        run.step = checkpoint.step
        return run

    def everything(self) -> dict[str, Any]:
        """All state by name, and the next value of each random generator."""
        found: dict[str, Any] = {}
        for name, value in self.objects().items():
            state = value.get_state() if name == "order" else value.state_dict()
            _flatten(state, name, found)
        python, numpy = random.getstate(), np.random.get_state()
        found["random"] = [random.random(), np.random.rand(), torch.random.get_rng_state().clone()]
        random.setstate(python)
        np.random.set_state(numpy)
        return found


def delay_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaves like a GPU without syncs: the record of step k arrives before step k + 1."""

    def deliver(optimizer: GuardedOptimizer, *, before: bool) -> None:
        if before:
            optimizer._recorder.deliver()

    monkeypatch.setattr(GuardedOptimizer, "_deliver", deliver)


def _flatten(value: Any, path: str, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{path}.{key}", into)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _flatten(item, f"{path}.{i}", into)
    else:
        into[path] = value.clone() if isinstance(value, torch.Tensor) else value
