"""A model and a batch without problems, for tests that add one problem."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastguard import Diagnosis, Finding


def sound_batch(n: int = 8) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(n, 4)
    return inputs, inputs[:, :1] * 2


def sound_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))


def by_kind(found: Diagnosis) -> dict[str, Finding]:
    return {finding.kind: finding for finding in reversed(found.findings)}
