"""Reads a zip directory, and accepts only archives in which all readers see the same records.

A zip archive stores everything twice: in the directory at its end, and in a header before each
record. Readers interpret archives differently: torch searches for the directory from the end, takes
the root from the first name, and ignores case; Python corrects offsets; a streaming reader uses the
headers. A crafted file can thus show one tensor to a verifier and another to `torch.load`.
Therefore this module accepts only archives in which all of these agree, as torch writes them:
uncompressed records in one folder, with distinct names, contiguous from the first byte of the file.

Source: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO

from fastguard.checkpoints.errors import DamagedFile

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_STREAMED, _UTF8 = 0x8, 0x800  # flags: sizes follow the data; names are in UTF-8
_DOS_FOLDER = 0x10  # attribute of a folder: torch leaves the memory of such a record uninitialized
_LONGEST_NAME = 500  # torch's reader truncates longer names
_MAX_RECORDS = 150_000  # each record takes about 10 µs; a pickle has at most about 100,000 tensors
_MAX_BYTES = 64 * 2**20  # directory size


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """One record of an archive.

    Attributes:
        name: Name without the root folder.
        header: First byte of its header.
        start, end: Byte range of its data.
        crc32: The checksum that the directory states.
    """

    name: str
    header: int
    start: int
    end: int
    crc32: int


def read_directory(file: IO[bytes], size: int) -> list[ZipRecord]:
    """Returns the records of an archive, in file order.

    Args:
        file: The archive.
        size: Size of the file in bytes.

    Raises:
        DamagedFile: The archive is damaged or ambiguous.
    """
    n_records, start, end = _place(file, size)
    file.seek(start)
    raw = file.read(end - start)
    if b"/constants.pkl" in raw:
        raise DamagedFile("a TorchScript archive is a program, not a checkpoint")
    records, roots, at = [], set(), 0
    for _ in range(n_records):
        entry, at = _entry(raw, at)
        root, _, name = entry.name.partition("/")
        roots.add(root)
        if len(roots) > 1 or not name:
            raise _differs("the records lie in several folders, or in none")
        records.append((entry, _local(file, entry, start, name)))
    if at != len(raw):
        raise _damaged("the directory does not have the stated length")
    _check_names([record.name for _, record in records])
    ordered = sorted(records, key=lambda pair: pair[1].header)
    _check_places(file, ordered, start)
    return [record for entry, record in ordered if not entry.name.endswith("/")]


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    raw_name: bytes
    flags: int
    crc32: int
    size: int
    header: int


def _damaged(what: str) -> DamagedFile:
    return DamagedFile(f"truncated or damaged: {what}")


def _differs(what: str) -> DamagedFile:
    return DamagedFile(f"damaged, or crafted so that programs read it differently: {what}")


def _place(file: IO[bytes], size: int) -> tuple[int, int, int]:
    """Returns the number of directory entries, and the directory's first byte and end."""
    file.seek(max(size - _END.size, 0))
    tail = file.read(_END.size)
    if len(tail) < _END.size or tail[:4] != b"PK\x05\x06":
        raise _damaged("the archive does not end with its directory")
    _, disk, first_disk, n_here, n, length, start, comment = _END.unpack(tail)
    if disk or first_disk or n_here != n or comment:
        raise _differs("the end record does not describe a complete, single archive")
    end = size - _END.size
    wide = _wide_place(file, end)
    if wide is not None:
        end, *exact = wide
        for narrow, found, most in zip(
            (n, length, start), exact, (_MAX16, _MAX32, _MAX32), strict=True
        ):
            if narrow not in (found, most):
                raise _differs("the two end records disagree")
        n, length, start = exact
    if start + length != end:
        raise _differs("the directory is not at the stated position")
    if n > _MAX_RECORDS or length > _MAX_BYTES:
        raise DamagedFile(f"the directory is too large: {n:,} records, {length:,} bytes")
    return n, start, end


def _wide_place(file: IO[bytes], end: int) -> tuple[int, int, int, int] | None:
    """For a 64-bit archive, returns the end, entry count, length and start of the directory."""
    at = end - _LOCATOR64.size
    if at < 0:
        return None
    file.seek(at)
    signature, disk, start, n_disks = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
    if signature != b"PK\x06\x07":
        return None
    if disk or n_disks > 1 or start != at - _END64.size:
        raise _differs("the 64-bit end record is not at the stated position")
    file.seek(start)
    found = _END64.unpack(file.read(_END64.size))
    signature, length, _made_by, _needed, disk, first_disk, n_here, n, n_bytes, first = found
    if (
        signature != b"PK\x06\x06"
        or length != _END64.size - 12
        or disk
        or first_disk
        or n_here != n
    ):
        raise _differs("the 64-bit end record does not describe a complete, single archive")
    return start, n, n_bytes, first


def _entry(raw: bytes, at: int) -> tuple[_Entry, int]:
    """Returns a directory entry and the position of the next one."""
    if at + _ENTRY.size > len(raw):
        raise _damaged("the directory ends too soon")
    (
        signature, _made_by, _needed, flags, method, _time, _date, crc32, packed, size,
        n_name, n_extra, n_comment, disk, _internal, attributes, header,
    ) = _ENTRY.unpack_from(raw, at)  # fmt: skip
    if signature != b"PK\x01\x02":
        raise _damaged("the directory has an invalid entry")
    at += _ENTRY.size
    raw_name = raw[at : at + n_name]
    extra = raw[at + n_name : at + n_name + n_extra]
    at += n_name + n_extra + n_comment
    if at > len(raw):
        raise _damaged("the directory ends too soon")
    name = raw_name.decode("utf-8", "surrogateescape")
    if min(raw_name, default=0) < 32 or "\\" in name or n_name > _LONGEST_NAME:
        raise _differs("a record has a name that readers cut or change")
    if method:
        raise DamagedFile(f"record {name.partition('/')[2]} is compressed, which torch does not do")
    if flags & ~(_STREAMED | _UTF8) or n_comment or disk or attributes & _DOS_FOLDER:
        raise _differs(f"record {name} is encrypted, a folder or split")
    size, packed, header = _exact(extra, size, packed, header)
    if size != packed:
        raise _differs(f"record {name} has two sizes")
    return _Entry(name, raw_name, flags, crc32, size, header), at


def _exact(extra: bytes, *values: int) -> list[int]:
    """Returns the sizes and offset of an entry, taking 64-bit values from its extra field."""
    wide, at = None, 0
    while at < len(extra):
        if at + 4 > len(extra):
            raise _damaged("the directory has an invalid extra field")
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if len(body) < length or kind == 0x7075:  # a second copy of the name, used by some readers
            raise _differs("a record has a second name, or a broken extra field")
        if kind == 1:
            if wide is not None or length % 8:
                raise _differs("a record has several sizes")
            wide = [number for (number,) in struct.iter_unpack("<Q", body)]
        at += 4 + length
    wide = wide or []
    found = [wide.pop(0) if value == _MAX32 and wide else value for value in values]
    if wide or _MAX32 in found:
        raise _differs("a record lacks its 64-bit sizes, or has more of them than it needs")
    return found


def _local(file: IO[bytes], entry: _Entry, limit: int, name: str) -> ZipRecord:
    """Returns the record of an entry after checking that its own header agrees."""
    file.seek(entry.header)
    raw = file.read(_LOCAL.size) if entry.header < limit else b""
    if len(raw) < _LOCAL.size or raw[:4] != b"PK\x03\x04":
        raise _damaged(f"no record at byte {entry.header}")
    _, _needed, flags, method, _time, _date, crc32, packed, size, n_name, n_extra = _LOCAL.unpack(
        raw
    )
    stated = (crc32, packed, size)
    expected = [(entry.crc32, entry.size, entry.size), (entry.crc32, _MAX32, _MAX32)]
    if flags & _STREAMED:
        expected += [(0, 0, 0), (0, _MAX32, _MAX32)]
    if file.read(n_name) != entry.raw_name or flags != entry.flags or method:
        raise _differs(f"record {entry.name} has a different name or form in its own header")
    if stated not in expected:
        raise _differs(f"record {entry.name} has a different size or checksum in its own header")
    start = entry.header + _LOCAL.size + n_name + n_extra
    if start + entry.size > limit:
        raise DamagedFile(f"truncated: record {name} extends past the end of the file")
    return ZipRecord(name, entry.header, start, start + entry.size, entry.crc32)


def _check_names(names: list[str]) -> None:
    if len({name.lower() for name in names}) < len(names):
        raise _differs("two of its records have the same name")


def _check_places(file: IO[bytes], ordered: list[tuple[_Entry, ZipRecord]], directory: int) -> None:
    """Checks that the records are contiguous from the first byte of the file."""
    at = 0
    for entry, record in ordered:
        if record.header != at:
            raise _differs(f"bytes before record {record.name} belong to no record")
        at = record.end
        if entry.flags & _STREAMED:
            at += _size_of_descriptor(file, record)
    if at != directory:
        raise _differs("bytes before its directory belong to no record")


def _size_of_descriptor(file: IO[bytes], record: ZipRecord) -> int:
    """Returns the size of the trailer after a record, which repeats its checksum and sizes."""
    size = record.end - record.start
    file.seek(record.end)
    raw = file.read(24)
    for form in ("<4sL2L", "<4sL2Q"):
        n = struct.calcsize(form)
        if len(raw) >= n and struct.unpack_from(form, raw) == (
            b"PK\x07\x08", record.crc32, size, size,
        ):  # fmt: skip
            return n
    raise _differs(f"record {record.name} has a different size or checksum after its data")
