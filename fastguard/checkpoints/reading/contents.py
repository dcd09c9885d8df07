"""Where the tensors of a checkpoint file lie: the zip and the legacy format of torch, safetensors.

Nothing here reads tensor data. A `Span` says which bytes of the file a tensor takes its elements
from, so that one pass over the file, in file order and in small pieces, can look at all of them.
"""

from __future__ import annotations

import errno
import io
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor

from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.reading.inert_unpickler import (
    NumpyArray,
    StorageRef,
    TensorRef,
    load_inert,
)
from fastguard.checkpoints.reading.named_leaves import named_leaves
from fastguard.checkpoints.reading.safetensors_header import read_safetensors
from fastguard.checkpoints.reading.spans import Contents, Record, Span
from fastguard.regular_files import open_regular

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """What a `.pt`, `.pth` or `.safetensors` file holds, without reading the tensors.

    Raises:
        DamagedFile: It is truncated, or in no known format.
        UnsafeFile: It asks to call a function that torch does not write.
        OSError: It cannot be opened, or is no regular file.
    """
    with open_regular(path) as file:
        return contents_of(file, path)


def contents_of(file: BinaryIO, path: str | os.PathLike[str]) -> Contents:
    """`read_contents`, of a file that is open.

    Args:
        file: The file.
        path: Its name, which tells safetensors.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(8)
    file.seek(0)
    try:
        if start[:4] == b"PK\x03\x04":
            return _read_zip(file, size)
        if Path(path).suffix.lower() == ".safetensors":
            return read_safetensors(file, size)
        return _read_legacy(file, size)
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # numbers and names of the file that make no sense
        raise DamagedFile(f"{os.fspath(path)}: damaged ({error!r})") from None


def read_shards(file: BinaryIO, path: Path, places: Sequence[tuple[int, int]]) -> Contents:
    """What a file of `torch.distributed.checkpoint` holds: one archive of torch behind the other.

    Args:
        file: The file, open.
        path: Its name.
        places: First byte and length of each shard.

    Returns:
        The tensors and checksums of all of them, each with the number of its shard and a slash
        before its name.

    Raises:
        DamagedFile, UnsafeFile, OSError: As `read_contents`.
    """
    spans: list[Span] = []
    records: list[Record] = []
    size = os.fstat(file.fileno()).st_size
    for i, (start, length) in enumerate(places):
        if not 0 <= start <= start + length:
            raise DamagedFile(f"damaged: {path} has no shard at byte {start}")
        if start + length > size:
            raise DamagedFile(f"truncated: {path}")
        try:
            shard = _read_zip(io.BufferedReader(_Stretch(file, start, length)), length)
        except CheckpointError as error:
            raise type(error)(f"{path}: {error}") from None
        for span in shard.spans:
            spans.append(replace(span, name=f"{i}/{span.name}", start=start + span.start))
        for r in shard.records:
            records.append(Record(f"{i}/{r.name}", start + r.start, start + r.end, r.crc32))
    return Contents(
        "torch (shards)",
        None,
        tuple(sorted(spans, key=lambda span: span.start)),
        tuple(sorted(records, key=lambda record: record.start)),
    )


class _Stretch(io.RawIOBase):
    """Some bytes of an open file, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        n = self._file.readinto(memoryview(buffer)[: max(self._size - self._at, 0)])  # type: ignore[attr-defined]
        self._at += n
        return n


# torch, zip: a directory of uncompressed records; `data.pkl` is the tree, `data/KEY` the storages.


def _read_zip(file: IO[bytes], size: int) -> Contents:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DamagedFile(f"truncated or damaged, the directory is unreadable ({error})") from None
    records: dict[str, Record] = {}
    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
        raise DamagedFile("a TorchScript archive is a program, not a checkpoint")
    for info in archive.infolist():
        _, _, name = info.filename.partition("/")
        if info.compress_type != zipfile.ZIP_STORED:
            raise DamagedFile(f"record {name} is compressed, which torch does not do")
        start = _data_start(file, info.header_offset, size)
        if start + info.file_size > size:
            raise DamagedFile(f"truncated: record {name} ends behind the end of the file")
        records[name] = Record(name, start, start + info.file_size, info.CRC)
    if "data.pkl" not in records:
        raise DamagedFile("no checkpoint of torch: it has no data.pkl")
    if "byteorder" in records and _bytes_of(file, records["byteorder"]) != b"little":
        raise DamagedFile("written on a big-endian machine, which is not supported")

    tree = load_inert(io.BytesIO(_bytes_of(file, records["data.pkl"])))
    places = {
        name.removeprefix("data/"): (record.start, record.end)
        for name, record in records.items()
        if name.startswith("data/")
    }
    spans, arrays = _spans(tree, places)
    in_order = tuple(sorted(records.values(), key=lambda record: record.start))
    return Contents("torch", tree, spans, in_order, arrays)


def _data_start(file: IO[bytes], header_offset: int, size: int) -> int:
    file.seek(max(header_offset, 0))
    header = file.read(_LOCAL_HEADER.size)
    if header_offset < 0 or len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise DamagedFile(f"damaged: no record at byte {header_offset} of {size}")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _bytes_of(file: IO[bytes], record: Record) -> bytes:
    file.seek(record.start)
    return file.read(record.end - record.start)


# torch before 1.6: five pickles, then each storage as its length (int64) and its elements.


def _read_legacy(file: IO[bytes], size: int) -> Contents:
    if load_inert(file) != _LEGACY_MAGIC:
        raise DamagedFile("neither a checkpoint of torch nor, by its name, a safetensors file")
    load_inert(file)  # protocol version
    load_inert(file)  # byte order and type sizes of the machine
    tree = load_inert(file)
    keys = load_inert(file)
    dtypes = {
        leaf.storage.key: leaf.storage.dtype or torch.uint8
        for _, leaf in named_leaves(tree)
        if isinstance(leaf, TensorRef)
    }
    places: dict[str, tuple[int, int]] = {}
    at = file.tell()
    for key in keys:
        file.seek(at)
        length = file.read(8)
        if len(length) < 8:
            raise DamagedFile(f"truncated: storage {key} is missing")
        if key not in dtypes:
            raise DamagedFile(f"damaged: nothing in the file says what storage {key} holds")
        start = at + 8
        at = start + struct.unpack("<q", length)[0] * dtypes[key].itemsize
        if not start <= at <= size:
            raise DamagedFile(f"truncated: storage {key} ends behind the end of the file")
        places[str(key)] = (start, at)
    spans, arrays = _spans(tree, places)
    return Contents("torch (legacy)", tree, spans, (), arrays)


def _spans(
    tree: Any, places: Mapping[str, tuple[int, int]]
) -> tuple[tuple[Span, ...], tuple[tuple[str, Tensor], ...]]:
    """The distinct tensors of a tree.

    Args:
        tree: What `load_inert` gave.
        places: First byte and end of each storage.
    """
    spans: dict[tuple[int, torch.dtype, tuple, tuple], Span] = {}
    arrays: list[tuple[str, Tensor]] = []
    for name, leaf in named_leaves(tree):
        if isinstance(leaf, NumpyArray) and leaf.values is not None:
            arrays.append((name, leaf.values))
        if not isinstance(leaf, TensorRef) or 0 in leaf.size:
            continue
        span = _span(name, leaf, leaf.storage, places)
        spans.setdefault((span.start, span.dtype, span.size, span.stride), span)
    return tuple(sorted(spans.values(), key=lambda span: span.start)), tuple(arrays)


def _span(
    name: str, ref: TensorRef, storage: StorageRef, places: Mapping[str, tuple[int, int]]
) -> Span:
    if storage.key not in places:
        raise DamagedFile(f"damaged: storage {storage.key} of {name} is missing")
    first, end = places[storage.key]
    itemsize = ref.dtype.itemsize
    unit = (storage.dtype or torch.uint8).itemsize
    n = 1 + sum((s - 1) * d for s, d in zip(ref.size, ref.stride, strict=True))
    start = first + storage.start * unit + ref.offset * itemsize
    negative = min(ref.offset, storage.start, *ref.size, *ref.stride, 0) < 0
    if negative or start + n * itemsize > end:
        raise DamagedFile(f"damaged: {name} reaches beyond its storage of {end - first} bytes")
    return Span(name, ref.dtype, start, n, ref.size, ref.stride, _is_dense(ref.size, ref.stride))


def _is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for step, length in sorted((d, s) for s, d in zip(size, stride, strict=True) if s != 1):
        if step != expected:
            return False
        expected *= length
    return True
