"""Beside a CPU build of torch, a torchvision built for CUDA cannot load its own operators.

Its Python part registers shapes for two of them while it is imported, and breaks where they do not
exist. Declared without an implementation they let the import pass; calling one is still an error.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_library: torch.library.Library | None = None  # its declarations live as long as it does


def define_missing_operators() -> None:
    """Declares the operators if torchvision is installed and cannot load them itself."""
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
