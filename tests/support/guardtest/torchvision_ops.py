"""Operators for a CUDA build of torchvision, which cannot load its own with a CPU build of torch.

On import, torchvision registers shapes for two operators, and fails if they do not exist.
Detectors call `nms` at validation, so it is implemented here in a few lines; `qnms` is declared
without an implementation: the import succeeds, and a call is still an error.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_library: torch.library.Library | None = None  # keeps its declarations alive


def define_missing_operators() -> None:
    """Defines the operators if torchvision is installed and cannot load them itself."""
    global _library
    spec = find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        _library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            _library.define(schema)
        _library.impl("nms", nms, "CPU")
        import torchvision.extension

        torchvision.extension._has_ops = lambda: (
            True
        )  # torchvision checks this before it calls an operator


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: keeps the best box, drops its overlaps, and repeats with the rest.

    Args:
        boxes: `(n, 4)`: x1, y1, x2, y2.
        scores: `(n,)`.
        iou_threshold: A box is dropped if its intersection over union with a better one is larger.

    Returns:
        int64 indices of the kept boxes, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    corners, opposite = boxes[:, None, :2], boxes[:, None, 2:]
    low, high = corners.maximum(boxes[None, :, :2]), opposite.minimum(boxes[None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    too_close = overlap > iou_threshold * (area[:, None] + area - overlap)
    dropped = torch.zeros(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if not dropped[i]:
            dropped[i + 1 :] |= too_close[i, i + 1 :]
    return order[~dropped]
