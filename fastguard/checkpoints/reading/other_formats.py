"""Recognizes other file formats by their first bytes, so they are not reported as damaged."""

from __future__ import annotations

BEGINNING = 256
"""Number of bytes needed to recognize a format."""

_STARTS = {
    b"\x93NUMPY": "a numpy array (.npy)",
    b"GGUF": "a GGUF file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x1f\x8b": "compressed with gzip",
    b"(\xb5/\xfd": "compressed with zstd",
}


def other_format(start: bytes) -> str | None:
    """Returns what a file is if it is not a torch or safetensors checkpoint; None if unknown.

    Example:
        >>> other_format(bytes([147]) + b"NUMPY and more")
        'a numpy array (.npy)'
    """
    for beginning, what in _STARTS.items():
        if start.startswith(beginning):
            return what
    if start.startswith(b"PK\x03\x04") and len(start) >= 30:
        n = int.from_bytes(start[26:28], "little")
        name = start[30 : 30 + n]  # name of the first record
        if name.endswith(b".npy"):
            return "numpy arrays (.npz)"
    return None
