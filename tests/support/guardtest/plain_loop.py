"""A small model, batches and optimizers for handwritten loops in tests."""

import math

import torch
from torch import nn

STEPS = 8
BAD = {1, 4}
OPTIMIZERS = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, fused=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
}


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def batches(left_out=(), poisoned=(), n=STEPS):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 6, 4, generator=generator)
    for i in poisoned:
        x[i, 2, 1] = math.nan
    return x[[i for i in range(n) if i not in left_out]]
