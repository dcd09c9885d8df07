"""The safetensors format: the length of a JSON header, the header, the data.

The rules are the same as in the reference reader, which refuses ambiguous files: tensor data must
be contiguous, without overlaps or holes, up to the last byte of the file. Duplicate names, which
the reference reader accepts, are refused here too, since readers differ in which one they use.

Source: https://huggingface.co/docs/safetensors/index
"""

from __future__ import annotations

import json
from itertools import accumulate
from operator import mul
from typing import IO, Any, NoReturn

import torch

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.spans import Contents, Span

_MAX_HEADER = 100 * 2**20  # bytes; the reference implementation refuses longer ones
_LARGEST = 2**64 - 1
# brackets, colons and commas in JSON; enough for 250,000 tensors, 240 MB when parsed
_MAX_MARKS = 3_000_000
_MAX_DIMENSIONS = 64  # the limit of torch's own loops over elements
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
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# Types whose elements share a byte. None of them has NaN or Inf, so their values are not checked.
# The entries are the bits per element and the dtype used for their bytes.
_PACKED = {
    "F4": (4, torch.float4_e2m1fn_x2),
    "F6_E2M3": (6, torch.uint8),
    "F6_E3M2": (6, torch.uint8),
}


def read_safetensors(file: IO[bytes], size: int) -> Contents:
    """Returns the tensors of a safetensors file of `size` bytes, opened at its start.

    Raises:
        DamagedFile: The reference reader would refuse the file, or a name occurs twice.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise DamagedFile(f"not a safetensors file, or truncated: a header of {length} bytes")
    try:
        header = json_without_doubles(file.read(length))
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not all(isinstance(text, str) for text in metadata.values()):
            raise DamagedFile("the __metadata__ contains a value that is not text")
        data = 8 + length
        spans = [_safetensor(name, entry, data, size) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"the header is not a safetensors header ({error!r})") from None
    spans.sort(key=lambda span: (span.start, span.end))
    _check_covered(spans, data, size)
    tree = {span.name: span for span in spans}
    return Contents("safetensors", tree, tuple(s for s in spans if s.n), metadata=metadata)


def json_without_doubles(raw: bytes) -> dict[str, Any]:
    """Parses a JSON object from UTF-8 text, refusing duplicate names.

    Raises:
        DamagedFile: The value is not an object, or a name occurs twice, which readers handle
            differently.
        ValueError: The text is not strict JSON; Python's extensions, such as NaN, are refused.
    """
    n_marks = sum(map(raw.count, (b",", b":", b"[", b"{")))
    if n_marks > _MAX_MARKS:
        raise DamagedFile(f"the JSON is too large: {n_marks:,} brackets, colons and commas")
    found = json.loads(
        raw.decode("utf-8"),
        object_pairs_hook=_without_doubles,
        parse_constant=_no_json,
        parse_int=lambda text: _no_json(text) if text == "-0" else int(text),
    )
    if not isinstance(found, dict):
        raise DamagedFile("the text is not a JSON object")
    if b"\\u" in raw:
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate is not text
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DamagedFile(
                    f"the name {name:.200} appears twice, which readers handle differently"
                )
            seen.add(name)
    return found


def _no_json(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _safetensor(name: str, entry: dict[str, Any], data: int, file_size: int) -> Span:
    kind = entry["dtype"]
    if kind in _PACKED:
        bits, dtype = _PACKED[kind]
    elif kind in _DTYPES:
        dtype = _DTYPES[kind]
        bits = dtype.itemsize * 8
    else:
        raise DamagedFile(f"{name:.200} has dtype {kind}, which is not supported")
    size, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int for number in (*size, begin, end)):
        raise DamagedFile(f"damaged: the shape or data_offsets of {name:.200} are not all integers")
    if len(size) > _MAX_DIMENSIONS:
        raise DamagedFile(
            f"{name:.200} has {len(size):,} dimensions; torch supports at most {_MAX_DIMENSIONS}"
        )
    n_bits = bits
    for length in size:  # as in the reference reader, a later size of 0 does not undo an overflow
        n_bits *= length
        if n_bits > _LARGEST:
            raise DamagedFile(f"damaged: {name:.200} is larger than any file")
    n_bytes, rest = divmod(n_bits, 8)
    if begin < 0 or rest or end - begin != n_bytes or min(size, default=1) < 0:
        shape = f"{list(size)}"
        raise DamagedFile(f"damaged: {name:.200} of shape {shape:.200} has {end - begin} bytes")
    if data + end > file_size:
        raise DamagedFile(f"truncated: {name:.200} extends past the end of the file")
    stride = tuple(accumulate(reversed(size[1:]), mul, initial=1))[::-1] if size else ()
    return Span(name, dtype, data + begin, n_bytes // dtype.itemsize, size, stride, dense=True)


def _check_covered(spans: list[Span], data: int, size: int) -> None:
    """Checks that the tensors, in file order, cover the data without gap or overlap."""
    at, before = data, "the header"
    for span in spans:
        if span.start < at:
            raise DamagedFile(f"damaged: {span.name:.200} overlaps {before:.200}")
        if span.start > at:
            raise DamagedFile(
                f"damaged: {span.start - at} bytes between {before:.200} and {span.name:.200} "
                "belong to no tensor"
            )
        at, before = span.end, span.name
    if at < size:
        raise DamagedFile(f"damaged: the last {size - at} bytes belong to no tensor")
