"""Small noisy images with one brighter quarter, and faulty batches."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

SIZE = 8  # pixels per side
CLASSES = 4  # one per quarter
Batch = tuple[Tensor, Tensor]


class Kind(Enum):
    """Kinds of faulty batches."""

    BAD_PIXEL = "one pixel is NaN"
    MISLABELED = "labels start at 1 instead of 0"


def draw(n: int, seed: int, fault: Kind | None = None) -> Batch:
    """Draws a batch; deterministic for a given seed.

    Args:
        n: Number of images.
        seed: Random seed; use the batch number to reproduce a batch.
        fault: Fault to inject, if any.

    Returns:
        Images `(n, 1, SIZE, SIZE)` float32 and classes `(n,)` int64.
    """
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=random)
    images = torch.randn(n, 1, SIZE, SIZE, generator=random)
    half = SIZE // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, half * row : half * (row + 1), half * column : half * (column + 1)] += 0.7
    if fault is Kind.BAD_PIXEL:
        images[0, 0, 0, 0] = math.nan
    if fault is Kind.MISLABELED:
        labels = (labels + 1) % CLASSES
    return images, labels
