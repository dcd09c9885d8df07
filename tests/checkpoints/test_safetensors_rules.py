"""Ambiguous safetensors files, and rare element types."""

import json
import struct

import pytest
import torch

from fastguard.checkpoints import DamagedFile, inspect
from guardtest.commands import ckpt


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


A, B = b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}', entry("U8", [2], 2, 4)
REFUSED = {
    "overlap": ({"a": entry("U8", [3], 0, 3), "b": B}, 4, "b overlaps a"),
    "inside": ({"a": entry("U8", [4], 0, 4), "b": B}, 4, "b overlaps a"),
    "same place": ({"a": B, "b": B, "c": entry("U8", [2], 0, 2)}, 4, "b overlaps a"),
    "hole": ({"a": entry("U8", [1], 0, 1), "b": B}, 4, "1 bytes between a and b belong to no"),
    "hole in front": ({"b": B}, 4, "2 bytes between the header and b belong to no"),
    "trailing bytes": ({"b": entry("U8", [2], 0, 2)}, 5, "the last 3 bytes belong to no tensor"),
    "nothing but bytes": ({}, 5, "the last 5 bytes belong to no tensor"),
    "an empty one inside": ({"a": entry("U8", [4], 0, 4), "e": entry("U8", [0], 3, 3)}, 4, "overl"),
    "a name twice": (b"{%b,%b}" % (A, A), 2, "name a appears twice"),
    "a key twice": (b'{"a":{"dtype":"U8",%b}' % A[5:], 2, "name dtype appears twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{},%b}' % A, 2, "ta__ appears twice"),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, 0, "a value that is not text"),
    "half a byte": ({"a": entry("F4", [3], 0, 2)}, 2, r"a of shape \[3\] has 2 bytes"),
    "a product beyond 64 bits": ({"a": entry("U8", [2**40, 2**40, 0], 0, 0)}, 0, "larger than any"),
    "a shape of floats": ({"a": entry("U8", [2.0], 0, 2)}, 2, "are not all integers"),
    "a shape of bools": ({"a": entry("U8", [True], 0, 1)}, 1, "are not all integers"),
    "NaN": (b'{"a":NaN}', 0, "not a safetensors header"),
    "UTF-16": ('{"a":{}}'.encode("utf-16"), 0, "not a safetensors header"),
    "a lone surrogate": (b'{"\\ud800":{}}', 0, "not a safetensors header"),
    "a lone surrogate in a value": (
        b'{"__metadata__":{"a":"\\ud800"}}',
        0,
        "not a safetensors header",
    ),
    "a list": (b"[]", 0, "is not a JSON object"),
}


@pytest.mark.parametrize(("header", "n_bytes", "says"), REFUSED.values(), ids=REFUSED)
def test_ambiguous_files_are_an_error(tmp_path, header, n_bytes, says):
    path = write(tmp_path / "x.safetensors", header, bytes(n_bytes))
    with pytest.raises(DamagedFile, match=says):
        inspect(path)


def test_everything_the_format_allows_is_read(tmp_path):
    header = {
        "__metadata__": None,
        "z": entry("U8", [2], 0, 2),
        "a": entry("F32", [], 2, 6),
        "first": entry("F32", [0, 7], 0, 0),
        "last": entry("F32", [3, 0], 6, 6),
        "more": {**entry("U8", [1, 1], 6, 7), "comment": "unknown keys are skipped"},
    }
    found = inspect(write(tmp_path / "x.safetensors", header, bytes(7)))
    assert [(span.name, span.size) for span in found.contents.spans] == [
        ("z", (2,)), ("a", ()), ("more", (1, 1)),
    ]  # fmt: skip
    assert found.bad == ()


NAN_BYTES = {
    "F8_E8M0": [0xFF],
    "F8_E4M3FNUZ": [0x80],
    "F8_E5M2FNUZ": [0x80],
    "F8_E4M3": [0x7F, 0xFF],
    "F4": [],
    "F6_E2M3": [],
    "F6_E3M2": [],
}


@pytest.mark.parametrize(("dtype", "nans"), NAN_BYTES.items(), ids=NAN_BYTES)
def test_every_byte_of_small_types_is_read_as_its_format_says(tmp_path, dtype, nans):
    for byte in range(256):
        n = {"4": 8, "6": 4}.get(dtype[1], 3)
        path = tmp_path / f"{byte}.safetensors"
        write(path, {"w": entry(dtype, [n], 0, 3 if n != 8 else 4)}, [byte] * (3 if n != 8 else 4))
        expected = (("w", 3, 0, 0),) if byte in nans else ()
        assert inspect(path).bad == expected, hex(byte)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_the_same_types_in_files_of_torch(tmp_path, name, zipped):
    dtype = getattr(torch, name)
    raw = torch.full((6,), 0x3F, dtype=torch.uint8)
    raw[4] = 0xFF if name.endswith("e8m0fnu") else 0x80
    path = tmp_path / "x.pt"
    torch.save({"scales": raw.view(dtype)}, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        assert inspect(path).bad == (("scales", 1, 0, 0),)
        return
    with pytest.raises(AttributeError):  # torch writes such a file, but cannot load it
        torch.load(path)
    with pytest.raises(DamagedFile, match="torch cannot load"):
        inspect(path)


def test_a_name_with_control_characters_is_printed_as_text(tmp_path, capsys):
    header = {"a\x1b[2J\nok  ": entry("F32", [1], 0, 4)}
    path = write(tmp_path / "x.safetensors", header, struct.pack("<f", float("nan")))
    status, out, _ = ckpt(capsys, "verify", path)
    assert status == 1
    assert r"a\x1b[2J\nok" in out and "\x1b" not in out and "\nok" not in out


def test_names_in_problems_and_of_files_are_printed_as_text(tmp_path, capsys):
    header = {"a\x1b[2J": entry("U8", [2], 0, 2), "b\nok": entry("U8", [2], 1, 3)}
    path = write(tmp_path / "x\x1b[2J\nok .safetensors", header, bytes(3))
    (tmp_path / "last.pt").write_bytes(b"")
    for arguments in (
        ("verify", path),
        ("verify", tmp_path),
        ("list", path),
        ("list", tmp_path),
        ("rollback", path),
        ("rollback", tmp_path / "last.pt"),
        ("rollback", tmp_path / "last.pt", "--to", path),
        ("rollback", tmp_path / "none\x1b[2J\nok"),
    ):
        status, out, err = ckpt(capsys, *arguments)
        assert status != 0 and "[2J" in out + err, arguments
        assert "\x1b" not in out + err and "\nok" not in out + err, arguments
