"""`load_weights`: loads a model's weights from any checkpoint file without unpickling it.

The readers of `fastguard.checkpoints` locate each tensor by name and byte position, in torch files
(including pickled modules) and safetensors files. The model's parameter names may have any common
prefix in the file: `state_dict.`, `model.`, `objects.model.module.`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from fastguard.checkpoints import CheckpointError
from fastguard.checkpoints.reading.contents import read_contents
from fastguard.checkpoints.reading.spans import Span
from fastguard.commands.usage import UsageError
from fastguard.errors import several
from fastguard.records.regular_files import open_regular


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Copies parameters and buffers from a file into the model.

    Raises:
        UsageError: The file cannot be read, lacks tensors of the model, or has tensors of another
            shape. The model is unchanged.
    """
    if path.is_dir():
        raise UsageError(f"--checkpoint {path} is a folder; pass a file in it")
    try:
        contents = read_contents(path)
    except CheckpointError as error:
        raise UsageError(f"--checkpoint {error}") from None
    wanted = {name: t for name, t in model.state_dict().items() if t.numel()}
    spans = {span.name: span for span in contents.spans}
    prefix = _prefix(spans, wanted)
    found = {name: spans[prefix + name] for name in wanted if prefix + name in spans}
    # A file may contain tied weights only once, under the first name.
    loaded = {wanted[name].data_ptr() for name in found}
    missing = [name for name, t in wanted.items() if name not in found]
    missing = [name for name in missing if wanted[name].data_ptr() not in loaded]
    if missing:
        raise UsageError(
            f"--checkpoint {path} lacks {len(missing)} of the model's {len(wanted)} tensors: "
            f"{several(missing)}; check that the file belongs to this model"
        )
    for name, span in found.items():
        if span.size != tuple(wanted[name].shape):
            raise UsageError(
                f"--checkpoint {path} has {name} with shape {list(span.size)}, the model has "
                f"{list(wanted[name].shape)}; check that the file belongs to this model"
            )
    for name, span in found.items():
        wanted[name].copy_(_read(path, span))


def _prefix(spans: dict[str, Span], wanted: dict[str, Tensor]) -> str:
    """The most frequent prefix before the model's names; on ties, the first in the file."""
    counts: Counter[str] = Counter()
    for name in spans:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    return max(counts, key=counts.__getitem__, default="")


def _read(path: Path, span: Span) -> Tensor:
    with open_regular(path) as file:
        file.seek(span.start)
        raw = bytearray(file.read(span.end - span.start))
    return torch.frombuffer(raw, dtype=span.dtype).as_strided(span.size, span.stride)
