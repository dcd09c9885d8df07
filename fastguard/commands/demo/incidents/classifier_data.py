"""Small noisy images, one quarter of each brighter, and the batches in which something is wrong."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

SIZE = 8  # pixels a side
CLASSES = 4  # which quarter it is
Batch = tuple[Tensor, Tensor]


class Kind(Enum):
    """What goes wrong in a batch."""

    BAD_PIXEL = "one pixel is NaN"
    MISLABELLED = "somebody counted the classes from 1"


def draw(n: int, seed: int, fault: Kind | None = None) -> Batch:
    """The same batch for the same seed.

    Args:
        n: How many images.
        seed: Of the random numbers; a batch can be had again by its number.
        fault: What is wrong with it.

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
    if fault is Kind.MISLABELLED:
        labels = (labels + 1) % CLASSES
    return images, labels
