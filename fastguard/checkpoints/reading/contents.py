"""Locates the tensors of a checkpoint file: torch zip, torch legacy, or safetensors.

Tensor data is not read here. A `Span` gives the position of a tensor's elements in the file, so
that a single pass over the file, in small pieces, can check all tensors.
"""

from __future__ import annotations

import errno
import io
import itertools
import math
import os
import struct
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.reading.inert_unpickler import Pickled, read_pickle
from fastguard.checkpoints.reading.inert_values import StorageRef, TensorRef
from fastguard.checkpoints.reading.named_leaves import named_leaves
from fastguard.checkpoints.reading.other_formats import BEGINNING, other_format
from fastguard.checkpoints.reading.pickled_arrays import NumpyArray
from fastguard.checkpoints.reading.safetensors_header import read_safetensors
from fastguard.checkpoints.reading.spans import Contents, Record, Span, is_dense
from fastguard.checkpoints.reading.zip_directory import read_directory
from fastguard.records.regular_files import open_regular

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_ALIGNMENT = ".storage_alignment"
_SMALL_RECORDS = frozenset(
    f"version .data/version .data/serialization_id byteorder .format_version {_ALIGNMENT}".split()
)
_SMALL = 1000  # bytes


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Returns the contents of a `.pt`, `.pth` or `.safetensors` file without reading tensors.

    Raises:
        DamagedFile: The file is truncated, or in an unknown format.
        UnsafeFile: The file would call a function that torch does not write.
        OSError: The file cannot be opened, or is not a regular file.
    """
    with open_regular(path) as file:
        return contents_of(file, path)


def contents_of(file: BinaryIO, path: str | os.PathLike[str]) -> Contents:
    """Like `read_contents`, for an open file.

    Args:
        file: The file.
        path: The name of the file, which identifies safetensors files.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(BEGINNING)
    file.seek(0)
    if (other := other_format(start)) is not None:
        raise DamagedFile(f"{os.fspath(path)}: {other}, not a torch or safetensors checkpoint")
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
    except Exception as error:  # invalid numbers and names in the file
        raise DamagedFile(f"{os.fspath(path)}: damaged ({error!r})") from None


def read_shards(file: BinaryIO, path: Path, places: Sequence[tuple[int, int]]) -> Contents:
    """Returns the contents of a `torch.distributed.checkpoint` file: consecutive torch archives.

    Args:
        file: The open file.
        path: The name of the file.
        places: First byte and length of each shard, which may not overlap.

    Returns:
        The tensors and checksums of all shards. Each name is prefixed with the number of its shard
        and a slash.

    Raises:
        DamagedFile, UnsafeFile, OSError: See `read_contents`.
    """
    spans: list[Span] = []
    records: list[Record] = []
    size = os.fstat(file.fileno()).st_size
    refused: list[str] = []
    spent = 0
    for start, length in places:
        if not 0 <= start <= start + length:
            raise DamagedFile(f"damaged: {path} has no shard at byte {start}")
        if start + length > size:
            raise DamagedFile(f"truncated: {path}")
    for (start, length), (following, _) in itertools.pairwise(sorted(places)):
        if following < start + length:
            raise DamagedFile(f"damaged: {path} has shards that overlap at byte {following}")
    for i, (start, length) in enumerate(places):
        try:
            part = io.BufferedReader(_FileRange(file, start, length))
            shard = _read_zip(part, length, start, spent)
        except CheckpointError as error:
            raise type(error)(f"{path}: {error}") from None
        for span in shard.spans:
            spans.append(replace(span, name=f"{i}/{span.name}", start=start + span.start))
        for r in shard.records:
            records.append(Record(f"{i}/{r.name}", start + r.start, start + r.end, r.crc32))
        refused += shard.refused
        spent = shard.spent
    return Contents(
        "torch (shards)",
        None,
        tuple(sorted(spans, key=lambda span: span.start)),
        tuple(sorted(records, key=lambda record: record.start)),
        refused=tuple(dict.fromkeys(refused)),
    )


class _FileRange(io.RawIOBase):
    """A range of bytes of an open file, presented as a file."""

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


# torch zip format: uncompressed records; `data.pkl` is the tree, `data/KEY` the storages.


def _read_zip(file: BinaryIO, size: int, origin: int = 0, spent: int = 0) -> Contents:
    """Returns the contents of a torch archive.

    Args:
        file: The archive.
        size: Size of the file in bytes.
        origin: Byte offset of the archive in the whole file, for values that the pickle leaves
            in the file.
        spent: See `BoundedReader`.
    """
    listed = read_directory(file, size)
    records = {r.name: Record(r.name, r.start, r.end, r.crc32) for r in listed}
    if "archive_format" in records:
        raise DamagedFile("a torch.export program (.pt2), not a torch or safetensors checkpoint")
    if "data.pkl" not in records:
        raise DamagedFile("not a torch checkpoint: it has no data.pkl")
    _check_opened_by_torch(file, records)
    if "byteorder" in records and _bytes_of(file, records["byteorder"]) != b"little":
        raise DamagedFile("written on a big-endian machine, which is not supported")
    if _ALIGNMENT in records and not _bytes_of(file, records[_ALIGNMENT]).isdigit():
        raise DamagedFile(f"damaged: the record {_ALIGNMENT} is not a number")

    pickled = records["data.pkl"]
    found = read_pickle(
        io.BufferedReader(_FileRange(file, pickled.start, pickled.end - pickled.start)),
        origin + pickled.start,
        spent,
    )
    places = {
        name.removeprefix("data/"): (record.start, record.end)
        for name, record in records.items()
        if name.startswith("data/")
    }
    in_order = tuple(sorted(records.values(), key=lambda record: record.start))
    return _contents("torch", [found], found.tree, places, in_order)


def _check_opened_by_torch(file: BinaryIO, records: Mapping[str, Record]) -> None:
    """Checks that torch's own reader finds the same records at the same offsets.

    torch's reader allocates the stated size of some small records, so their sizes are checked
    first. The reader also ignores the case of names: it takes a record `BYTEORDER` for the record
    `byteorder`.
    """
    for name in _SMALL_RECORDS:
        if name in records and records[name].end - records[name].start > _SMALL:
            raise DamagedFile(f"record {name} is far too large")
    for name in records:
        lower = name.lower()
        if lower != name and (lower in _SMALL_RECORDS or lower.startswith("data/")):
            raise DamagedFile(f"damaged: torch reads the record {name:.80} as {lower:.80}")
    file.seek(0)
    try:
        reader = torch._C.PyTorchFileReader(file)
        offset_of = reader.get_record_offset  # type: ignore[attr-defined]
        places = {name: offset_of(name) for name in reader.get_all_records()}
    except RuntimeError as error:
        why = str(error).partition("  (Could")[0].splitlines()[0][:200]
        raise DamagedFile(f"torch cannot open it: {why}") from None
    if places != {name: record.start for name, record in records.items()}:
        raise DamagedFile("damaged: torch finds other records than its directory lists")


def _bytes_of(file: IO[bytes], record: Record) -> bytes:
    file.seek(record.start)
    return file.read(record.end - record.start)


# The format of torch before 1.6: five pickles, then each storage as its length (int64) and its
# elements.


def _read_legacy(file: IO[bytes], size: int) -> Contents:
    _check_no_tar(file)
    magic = read_pickle(file)
    if magic.tree != _LEGACY_MAGIC:
        raise DamagedFile("neither a torch checkpoint nor, by its name, a safetensors file")
    version = read_pickle(file, spent=magic.spent)
    if version.tree != _LEGACY_VERSION:
        raise DamagedFile("damaged: it does not have the version of torch's format before 1.6")
    machine = read_pickle(file, spent=version.spent)  # byte order and type sizes of the machine
    found = read_pickle(file, spent=machine.spent, has_views=True)
    listed = read_pickle(file, spent=found.spent)
    keys = listed.tree
    if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
        raise DamagedFile("damaged: it has no list of storages")
    if len(set(keys)) < len(keys):
        raise DamagedFile("damaged: it has the same storage twice")
    dtypes = {ref.key: ref.dtype or torch.uint8 for ref in found.storages.values()}
    places: dict[str, tuple[int, int]] = {}
    at = file.tell()
    for key in map(str, keys):
        file.seek(at)
        length = file.read(8)
        if len(length) < 8:
            raise DamagedFile(f"truncated: storage {key:.80} is missing")
        if key not in dtypes:
            raise DamagedFile(f"damaged: nothing in the file says what storage {key:.80} holds")
        start = at + 8
        at = start + struct.unpack("<q", length)[0] * dtypes[key].itemsize
        if not start <= at <= size:
            raise DamagedFile(f"truncated: storage {key:.80} extends past the end of the file")
        places[key] = (start, at)
    pickles = magic, version, machine, found, listed
    return _contents("torch (legacy)", pickles, found.tree, places, ())


def _check_no_tar(file: IO[bytes]) -> None:
    """Raises a DamagedFile if the file is also a tar archive, which torch would try first."""
    header = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return
    raise DamagedFile("a tar archive, as torch wrote in 2016; current torch refuses it")


def _contents(
    form: str,
    pickles: Sequence[Pickled],
    tree: Any,
    places: Mapping[str, tuple[int, int]],
    records: tuple[Record, ...],
) -> Contents:
    """Collects the distinct tensors and the numpy arrays of a tree.

    Args:
        form: The format; see `Contents`.
        pickles: All pickles of the file.
        tree: The tree of the pickle that has the tensors.
        places: First byte and end of each storage.
        records: See `Contents`.
    """
    spans: dict[tuple[int, torch.dtype, tuple, tuple], Span] = {}
    arrays: list[tuple[str, NumpyArray]] = []
    unread: list[tuple[str, str]] = []
    left_in_file: set[int] = set()
    nan: list[str] = []
    seen: set[int] = set()
    for name, leaf in named_leaves(tree):
        if isinstance(leaf, float) and leaf != leaf:
            nan.append(name)
        if not isinstance(leaf, TensorRef | StorageRef | NumpyArray) or id(leaf) in seen:
            continue
        seen.add(id(leaf))
        if isinstance(leaf, NumpyArray):
            if leaf.is_readable and leaf.start not in left_in_file:
                arrays.append((name, leaf))
            if leaf.start is not None:
                left_in_file.add(leaf.start)
            if leaf.unread is not None:
                unread.append((name, leaf.unread))
        if isinstance(leaf, StorageRef) and leaf.dtype is not None:  # no tensor uses this storage
            leaf = TensorRef(leaf, leaf.dtype, 0, (leaf.n,), (1,))
        elif isinstance(leaf, StorageRef) and leaf.n:
            _check_storage(leaf, places)
            unread.append((name, "a storage without an element type"))
        if not isinstance(leaf, TensorRef):
            continue
        _check_storage(leaf.storage, places)
        if 0 not in leaf.size:
            span = _span(name, leaf, leaf.storage, places)
            spans.setdefault((span.start, span.dtype, span.size, span.stride), span)
    in_order = tuple(sorted(spans.values(), key=lambda span: span.start))
    return Contents(
        form,
        tree,
        in_order,
        records,
        tuple(arrays),
        tuple(unread),
        names=tuple(dict.fromkeys(name for found in pickles for name in found.names)),
        refused=tuple(dict.fromkeys(what for found in pickles for what in found.refused)),
        nan=tuple(nan),
        spent=pickles[-1].spent,
    )


def _check_storage(ref: StorageRef, places: Mapping[str, tuple[int, int]]) -> None:
    """Checks that a storage and its record have the same size, as torch requires."""
    if ref.key in places:
        start, end = places[ref.key]
        itemsize = (ref.dtype or torch.uint8).itemsize
        if ref.n_stored * itemsize != end - start:
            raise DamagedFile(
                f"damaged: storage {ref.key:.80} claims {ref.n_stored} elements of {itemsize} "
                f"bytes but has {end - start} bytes"
            )


def _span(
    name: str, ref: TensorRef, storage: StorageRef, places: Mapping[str, tuple[int, int]]
) -> Span:
    if storage.key not in places:
        raise DamagedFile(f"damaged: storage {storage.key:.80} of {name:.200} is missing")
    first, end = places[storage.key]
    itemsize = ref.dtype.itemsize
    unit = (storage.dtype or torch.uint8).itemsize
    end = min(end, first + (storage.start + storage.n) * unit)
    n = 1 + sum((s - 1) * d for s, d in zip(ref.size, ref.stride, strict=True))
    start = first + storage.start * unit + ref.offset * itemsize
    negative = min(ref.offset, storage.start, *ref.size, *ref.stride, 0) < 0
    if negative or start + n * itemsize > end or math.prod(ref.size) >= 2**63:
        raise DamagedFile(f"damaged: {name:.200} extends past its storage of {end - first} bytes")
    return Span(name, ref.dtype, start, n, ref.size, ref.stride, is_dense(ref.size, ref.stride))
