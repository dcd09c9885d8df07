"""Noisy images of one bright disc each, and faulty batches."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

SIZE = 32  # pixels per side
Batch = tuple[Tensor, dict[str, Tensor]]


class Kind(Enum):
    """Kinds of faulty batches."""

    LETTERBOX = "a resize padded half of an image with black"
    TWELVE_BITS = "images of another microscope range from 0 to 4095"
    MICROMETERS = "the distance maps are in micrometers instead of centimeters"


def draw(n: int, random: torch.Generator, fault: Kind | None = None) -> Batch:
    """Draws a batch of n images and its targets.

    Args:
        n: Number of images.
        random: Generator for position, size and noise.
        fault: Fault to inject, if any.

    Returns:
        Images `(n, 1, SIZE, SIZE)`, in 0..1 without a fault, and a dict of targets of the same
        shape: `mask` and `boundary`, 0 or 1; `level`, the distance from the boundary in pixels,
        positive inside; `distance`, the same in units of the image width.
    """
    rows, columns = torch.meshgrid(*[torch.arange(SIZE).float()] * 2, indexing="ij")
    place = 6 + (SIZE - 12) * torch.rand(n, 2, 1, 1, generator=random)
    radius = 4 + 6 * torch.rand(n, 1, 1, generator=random)
    level = radius - torch.hypot(rows - place[:, 0], columns - place[:, 1])
    mask = (level > 0).float()
    brightness = 0.2 + 0.2 * torch.rand(n, 1, 1, generator=random)
    noise = 0.1 * torch.randn(n, SIZE, SIZE, generator=random)
    images = (brightness + 0.4 * mask + noise).clamp(0.01, 1.0)

    if fault is Kind.LETTERBOX:
        images[0, :, SIZE // 2 :] = 0.0
    if fault is Kind.TWELVE_BITS:
        images = 4095.0 * images
    unit = 10_000.0 if fault is Kind.MICROMETERS else 1.0
    targets = {
        "mask": mask,
        "boundary": (level.abs() < 1.5).float(),
        "level": level,
        "distance": unit * level / SIZE,
    }
    return images[:, None], {name: values[:, None] for name, values in targets.items()}
