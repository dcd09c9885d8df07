"""Points and signed distances of a few plane shapes, and faulty scans."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

SHAPES = 8
POINTS = 64  # per shape in a batch
Batch = tuple[Tensor, Tensor, Tensor]


class Kind(Enum):
    """Kinds of faulty batches."""

    OPEN_MESH = "a mesh with a hole has no inside: the distances of one shape are NaN"
    MILLIMETERS = "one shape was not normalized: its distances are a thousand times too large"
    LOST_SCALE = "the scales are missing, so all distances were divided by 0"


def sample(n: int, random: torch.Generator, fault: Kind | None = None) -> Batch:
    """Samples points around n shapes: squares and discs of several sizes.

    Args:
        n: Number of shapes.
        random: Generator for shapes and points.
        fault: Fault to inject, if any.

    Returns:
        Shape ids `(n,)` int64; points `(n, POINTS, 2)` in -1..1; signed distances `(n, POINTS)`,
        negative inside, within -1..1 without a fault.
    """
    shapes = torch.randint(SHAPES, (n,), generator=random)
    points = 2 * torch.rand(n, POINTS, 2, generator=random) - 1
    size = 0.25 + 0.06 * shapes[:, None]
    disc, square = points.norm(dim=2) - size, points.abs().amax(dim=2) - size
    distances = torch.where(shapes[:, None] % 2 > 0, disc, square)
    if fault is Kind.OPEN_MESH:
        distances[0] = torch.nan
    elif fault is Kind.MILLIMETERS:
        distances[0] *= 1000.0
    elif fault is Kind.LOST_SCALE:
        distances = distances / 0.0
    return shapes, points, distances
