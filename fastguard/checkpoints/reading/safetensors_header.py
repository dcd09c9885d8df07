"""The safetensors format: the length of a JSON header, the header, the data.

Source: https://huggingface.co/docs/safetensors/index
"""

from __future__ import annotations

import json
import math
from typing import IO, Any

import torch

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.spans import Contents, Span

_MAX_HEADER = 100 * 2**20  # bytes; the reference implementation refuses longer ones
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def read_safetensors(file: IO[bytes], size: int) -> Contents:
    """The tensors of a safetensors file of `size` bytes, open at its start."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise DamagedFile(f"no safetensors file, or truncated: a header of {length} bytes")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        spans = [_safetensor(name, entry, 8 + length, size) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"its header is no safetensors header ({error!r})") from None
    spans = sorted((span for span in spans if span.n), key=lambda span: span.start)
    return Contents("safetensors", None, tuple(spans), metadata=metadata)


def _safetensor(name: str, entry: dict[str, Any], data: int, file_size: int) -> Span:
    if entry["dtype"] not in _DTYPES:
        raise DamagedFile(f"{name} has dtype {entry['dtype']}, which is unknown here")
    dtype = _DTYPES[entry["dtype"]]
    size = tuple(int(s) for s in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    n = math.prod(size)
    if begin < 0 or end - begin != n * dtype.itemsize or min(size, default=1) < 0:
        raise DamagedFile(f"damaged: {name} of shape {list(size)} has {end - begin} bytes")
    if data + end > file_size:
        raise DamagedFile(f"truncated: {name} ends behind the end of the file")
    stride = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    return Span(name, dtype, data + begin, n, size, stride, dense=True)
