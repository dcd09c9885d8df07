"""Archives whose pickles are random programs, and archives joined from pieces of two."""

from __future__ import annotations

import random
import struct
import zipfile
from pathlib import Path

NAN = float("nan")


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _call(name: str, arguments: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + arguments + b"tR"


def _storage(key: str) -> bytes:
    return (
        b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu") + b"K\2tQ"
    )


def _tensor(key: str) -> bytes:
    hooks = _call("collections OrderedDict", b"")
    return _call(
        "torch._utils _rebuild_tensor_v2", _storage(key) + b"K\0K\2\x85K\1\x85\x89" + hooks
    )


_TENSORS = [_tensor("good"), _tensor("bad")]
_HASHABLE = [
    _text("cpu"), _text("w"), b"N", b"\x88", b"K\1", b"K\1\x85", b"G" + struct.pack(">d", 1.0),
    b"U\2\xc3\xa9", _text("Ã©"), b"U\1\xe9", _call("torch device", _text("cpu")), _text("strided"),
    _call("torch.serialization _get_layout", _text("torch.strided")), _text("torch.strided"),
    _call("torch Size", b"K\1\x85"), _call("_codecs encode", _text("w") + _text("latin1")),
    _call("_codecs encode", _text("w") + _text("utf-16")), b"ctorch\nfloat32\n", b"K\1K\2\x86",
    _call("__builtin__ complex", b"K\1K\0"), _call("__builtin__ frozenset", b"](K\1e"),
    b"\x8a\x0a" + bytes(9) + b"\1", b"]\x85", *_TENSORS,
]  # fmt: skip
_VALUES = [
    *_TENSORS, *_TENSORS, *_HASHABLE, b"]", b"}", _storage("good"), _storage("bad"),
    _call("collections OrderedDict", b""), _call("collections Counter", b"}"), b"\x8f",
    b"ctorch\nFloatTensor\n]G" + struct.pack(">d", NAN) + b"a\x85R", b"N2\x86", b"K\1K\2K\3\x87",
]  # fmt: skip


def _container(rng: random.Random, depth: int) -> bytes:
    """Pushes a container whose items are random values and, up to a depth, containers."""

    def value() -> bytes:
        nested = depth < 3 and rng.random() < 0.4
        return _container(rng, depth + 1) if nested else rng.choice(_VALUES)

    kind = rng.randrange(8)
    n = rng.randrange(5)
    if kind <= 2:
        begin = rng.choice([b"}", b"}", _call("collections OrderedDict", b"")])
        made = begin + b"(" + b"".join(rng.choice(_HASHABLE) + value() for _ in range(n)) + b"u"
    elif kind == 3:
        made = b"](" + b"".join(value() for _ in range(n)) + b"e"
    elif kind == 4:
        made = b"(" + b"".join(value() for _ in range(n)) + b"t"
    elif kind == 5:
        made = _call("torch._utils _rebuild_parameter", value() + b"\x89N")
    elif kind == 6:
        made = _call("collections OrderedDict", b"")
        for _ in range(n):
            made += b"}" + _text("a") + value() + b"s" + b"b"
    else:
        made = _call("__builtin__ set", b"](" + b"".join(rng.choice(_HASHABLE) for _ in range(n)))
        made = made[:-2] + b"etR"
    if rng.random() < 0.2:
        made += b"q" + bytes([depth]) + rng.choice([b"", b"0h" + bytes([depth])])
    return made


def random_program(rng: random.Random, folder: Path) -> Path:
    """Writes an archive with two storages, one with NaN, and a program that uses them."""
    path = folder / "plain.pt"
    records = {"data.pkl": b"\x80\x02" + _container(rng, 0) + b".", "version": b"3\n"}
    for name, first in (("good", 1.0), ("bad", NAN)):
        records[f"data/{name}"] = struct.pack("<2f", first, 2.0)
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in records.items():
            archive.writestr(f"x/{name}", raw)
    return path


def joined_archives(rng: random.Random, folder: Path) -> Path:
    """Joins two archives, or pieces of them at the borders of their records."""
    path = folder / "plain.pt"
    first = path.read_bytes()
    second = random_program(rng, folder).read_bytes()
    if rng.random() < 0.5:
        first, second = second, first
    marks = [i for i in range(len(first)) if first[i : i + 2] == b"PK"]
    others = [i for i in range(len(second)) if second[i : i + 2] == b"PK"]
    kind = rng.randrange(5)
    if kind == 0:
        raw = first + second
    elif kind == 1:
        raw = first[: rng.choice(marks)] + second[rng.choice(others) :]
    elif kind == 2:  # the records of one archive and the directory of the other
        raw = first[: first.rindex(b"PK\1\2")] + second[second.index(b"PK\1\2") :]
    elif kind == 3:
        at = rng.choice(marks)
        raw = first[:at] + second + first[at:]
    else:
        raw = first[:-2] + struct.pack("<H", len(second) % 65536) + second
    path.write_bytes(raw)
    return path
