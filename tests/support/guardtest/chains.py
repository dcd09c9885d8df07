"""Models with a fault between two healthy layers, and batches that trigger it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Call(nn.Module):
    """A module that does one thing."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Refine(nn.Module):
    """The refinement of incident C: boundary normals of unit length."""

    def __init__(self, eps: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.eps = eps

    def forward(self, x):
        normal = self.conv(x)
        return x + normal / (normal.norm(dim=1, keepdim=True) + self.eps)


class SegNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.refine = Refine()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.refine(self.encoder(x)))


def chain(*modules, n: int = 4) -> nn.Sequential:
    """A linear layer, the module under test, and another linear layer."""
    first, last = nn.Linear(n, n, bias=False), nn.Linear(n, n)
    return nn.Sequential(first, *modules, last)


def mean(output: Tensor, _target: object = None) -> Tensor:
    return output.float().mean()


def zeros(n: int = 4):
    return torch.zeros(2, n), None
