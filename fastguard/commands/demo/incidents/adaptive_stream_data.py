"""Camera images of one colored disc on black, and faulty batches."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

SIZE = 224  # pixels per side
BRIGHTEST = 255.0
COLORS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]]).float()
Batch = tuple[Tensor, dict[str, Tensor]]


class Kind(Enum):
    """Kinds of faulty batches."""

    DEAD_PIXEL = "one pixel of the sensor is NaN"
    SWAPPED_BYTES = "a row of an image was read in the wrong byte order"
    SIXTEEN_BITS = "masks are 0 or 65535, as in the files, instead of 0 or 1"


def draw(n: int, seed: int, fault: Kind | None = None, *, scaled: bool = True) -> Batch:
    """Draws a batch; deterministic for a given seed.

    Args:
        n: Number of images.
        seed: Random seed; use the batch number to reproduce a batch.
        fault: Fault to inject, if any.
        scaled: Whether the images range from 0 to 1; otherwise to 255, as from the camera.

    Returns:
        Images `(n, 3, SIZE, SIZE)`, and a dict of targets: `mask` `(n, 1, SIZE, SIZE)`, 1 on the
        disc, and `label` `(n,)` int64, the index of its color.
    """
    random = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*[torch.arange(SIZE).float()] * 2, indexing="ij")
    place = 60 + (SIZE - 120) * torch.rand(n, 2, 1, 1, generator=random)
    radius = 30 + 25 * torch.rand(n, 1, 1, generator=random)
    mask = (torch.hypot(rows - place[:, 0], columns - place[:, 1]) < radius).float()[:, None]
    label = torch.randint(len(COLORS), (n,), generator=random)
    brightness = 0.4 + 0.4 * torch.rand(n, 3, 1, 1, generator=random)
    noise = 0.1 * torch.rand(n, 3, SIZE, SIZE, generator=random)
    images = (brightness * COLORS[label][..., None, None] + noise) * mask

    images *= 1.0 if scaled else BRIGHTEST
    if fault is Kind.DEAD_PIXEL:
        images[0, 0, SIZE // 2, SIZE // 2] = math.nan
    if fault is Kind.SWAPPED_BYTES:
        signs = torch.randn(3, SIZE, generator=random).sign()
        images[0, :, SIZE // 2] = torch.finfo(torch.float32).max * signs
    if fault is Kind.SIXTEEN_BITS:
        mask *= 65535.0
    return images, {"mask": mask, "label": label}
