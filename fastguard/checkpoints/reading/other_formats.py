"""Files of other formats, told by their first bytes, so that none of them is called damaged."""

from __future__ import annotations

BEGINNING = 256
"""Bytes of a file that tell."""

_STARTS = {
    b"\x93NUMPY": "an array of numpy (.npy)",
    b"GGUF": "a GGUF file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x1f\x8b": "compressed with gzip",
    b"(\xb5/\xfd": "compressed with zstd",
}


def other_format(start: bytes) -> str | None:
    """What a file is that is no checkpoint of torch or safetensors; None: its start does not tell.

    Example:
        >>> other_format(bytes([147]) + b"NUMPY and more")
        'an array of numpy (.npy)'
    """
    for beginning, what in _STARTS.items():
        if start.startswith(beginning):
            return what
    if start.startswith(b"PK\x03\x04") and len(start) >= 30:
        n = int.from_bytes(start[26:28], "little")
        name = start[30 : 30 + n]  # of the first record
        if name.endswith(b".npy"):
            return "arrays of numpy (.npz)"
    return None
