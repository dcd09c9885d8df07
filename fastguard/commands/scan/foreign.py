"""Identifies files that are not text by their first bytes, and names the remedy."""

from __future__ import annotations

import re


class NotTextError(Exception):
    """The data is not text; the message says what it is and what to do."""


_UNPACK = "unpack it first: {} FILE | fastguard scan -"

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xfd7zXZ\x00", "the file is compressed with xz; " + _UNPACK.format("xz -dc")),
    (4, b"1AY&SY", "the file is compressed with bzip2; " + _UNPACK.format("bzip2 -dc")),
    (0, b"\x28\xb5\x2f\xfd", "the file is compressed with zstd; " + _UNPACK.format("zstd -dc")),
    (0, b"\x04\x22\x4d\x18", "the file is compressed with lz4; " + _UNPACK.format("lz4 -dc")),
    (0, b"7z\xbc\xaf\x27\x1c", "the file is a 7z archive; unpack it first"),
    (
        0,
        b"PK\x03\x04",
        "the file is a zip archive; unpack it first, or use fastguard ckpt verify for a checkpoint",
    ),
    (
        0,
        b":W&B",
        "the file is a binary file of wandb; the text log is output.log in the same folder",
    ),
    (0, b"SQLite format 3", "the file is an SQLite database, not a text log"),
    (0, b"PAR1", "the file is a Parquet file, not a text log; write it as CSV first"),
    (0, b"\x89HDF", "the file is an HDF5 file, not a text log"),
    (0, b"\x93NUMPY", "the file is a NumPy array, not a text log"),
    (0, b"\x7fELF", "the file is a program, not a text log"),
    (0, b"%PDF", "the file is a PDF, not a text log"),
)
_EVENTS = b"brain.Event"  # at the start of the first record, after 12 bytes of length and checksum

_TEXT_CONTROLS = b"\a\b\t\n\v\f\r\x1b"
_CONTROLS = bytes(b for b in range(32) if b not in _TEXT_CONTROLS)
_ZEROS = re.compile(rb"\0{64,}+")
"""Zeros at the end of a block, as a crash during a write leaves them in a text log."""

LOOKED_AT = 1 << 16
MAX_SHARE, ALLOWED = 0.04, 8
"""Maximum share of control characters in text, and a number of them that is always accepted. In
random bytes, 9 % are control characters. All other bytes are accepted, so that text may have any
encoding.
"""


def is_events(first: bytes) -> bool:
    """Whether a file with this beginning is a TensorBoard event file."""
    return _EVENTS in first[:64]


def refuse_foreign(first: bytes) -> None:
    """Checks that the first bytes look like text.

    Raises:
        NotTextError: The bytes are not text.
    """
    for offset, magic, what in _MAGIC:
        if first.startswith(magic, offset):
            raise NotTextError(what)
    if is_events(first):
        raise NotTextError(
            "the data is a TensorBoard event file, which cannot be read from a pipe; name the file"
        )
    text = _ZEROS.sub(b"", first[:LOOKED_AT]).strip(b"\0")
    controls = len(text) - len(text.translate(None, _CONTROLS))
    if controls > max(ALLOWED, MAX_SHARE * len(text)):
        raise NotTextError(
            "the log is not text, but binary data, or UTF-16 or UTF-32 without a byte order mark"
        )
