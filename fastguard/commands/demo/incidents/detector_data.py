"""A detector that fits on one core: a YAML architecture and images with two kinds of boxes."""

# pyright: reportMissingImports=false
from __future__ import annotations

from pathlib import Path

import numpy as np

SIZE = 64  # pixels per side
COLORS = {"green": (60, 255, 60), "blue": (255, 60, 60)}  # by class, in OpenCV's BGR order

ARCHITECTURE = """\
nc: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C3k2, [16, False, 0.5]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, SPPF, [32, 5]]
head:
  - [-1, 1, Conv, [32, 3, 1]]
  - [[5], 1, Detect, [nc]]
"""


def write_detector(folder: Path, n_train: int, n_val: int = 4, seed: int = 0) -> tuple[Path, Path]:
    """Draws noise images with one box per class, and writes the files that a trainer needs.

    Args:
        folder: Folder to create.
        n_train, n_val: Numbers of images.
        seed: Random seed.

    Returns:
        The architecture and the data set, both as YAML files.
    """
    import cv2

    random = np.random.default_rng(seed)
    for split, n in (("train", n_train), ("val", n_val)):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(n):
            image, boxes = _draw(random)
            cv2.imwrite(str(images / f"{i:03}.png"), image)
            (labels / f"{i:03}.txt").write_text("\n".join(boxes))
    architecture, data = folder / "tiny.yaml", folder / "data.yaml"
    architecture.write_text(ARCHITECTURE)
    data.write_text(
        f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: {[*COLORS]}\n"
    )
    return architecture, data


def _draw(random: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Returns an image and its labels.

    The image is `(SIZE, SIZE, 3)` uint8. There is one label per box: its class, center, width and
    height, relative to `SIZE`.
    """
    image = random.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
    lines = []
    for k, color in enumerate(COLORS.values()):
        w, h = random.integers(16, 28, 2)
        x, y = random.integers(0, SIZE - w), random.integers(0, SIZE - h)
        image[y : y + h, x : x + w] = color
        shares = np.array([x + w / 2, y + h / 2, w, h]) / SIZE
        lines.append(" ".join([str(k), *(f"{share:.6f}" for share in shares)]))
    return image, lines
