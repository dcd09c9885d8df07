"""`verify` checks the values that `torch.load` returns, and names what `torch.load` refuses.

torch also loads each file.
"""

import json
import struct
import zipfile

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import DamagedFile, UnsafeFile, inspect, manifest
from fastguard.checkpoints.reading.inspect_file import sha256_of
from fastguard.commands.cli import main

NAN = float("nan")


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def python2(value):
    return b"U" + bytes([len(value)]) + value


def tensor(key):
    """Pushes the two elements of a storage."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + key + text("cpu") + b"K\x02tQ"
    rest = b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest


def call(name, *arguments):
    return b"c" + name.replace(".", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


GOOD, BAD = tensor(text("good")), tensor(text("bad"))
CODEC = b"c_codecs\nencode\n(", b"tR"


def archive(path, tree):
    records = {"data.pkl": b"\x80\x02" + tree + b".", "version": b"3\n"}
    for name, first in {"good": 1, "bad": NAN}.items():
        records[f"data/{name}"] = struct.pack("<2f", first, 2)
    with zipfile.ZipFile(path, "w") as made:
        for name, raw in records.items():
            made.writestr(f"x/{name}", raw)
    return path


KEYS = {  # two keys that differ for torch
    "device": (call("torch.device", text("cpu")), text("cpu")),
    "layout": (b"ctorch.serialization\n_get_layout\n" + text("torch.strided") + b"\x85R",
               text("torch.strided")),
    "tensor without data": (
        b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n))\x89tR", b"N"),
    "frozenset": (call("__builtin__.frozenset", b"]K\x01a"), b"K\x01\x85"),
    "text of Python 2": (python2("é".encode()), text("é".encode().decode("latin1"))),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_no_value_is_lost_to_a_key_that_only_looks_equal(tmp_path, name):
    first, second = KEYS[name]
    path = archive(tmp_path / "x.pt", b"}(" + first + BAD + second + GOOD + b"u")
    tree = torch.load(path, weights_only=name != "frozenset")
    assert [bool(value.isnan().any()) for value in tree.values()] == [True, False]
    assert len(inspect(path).bad) == 1


@pytest.mark.parametrize("turned", [False, True])
def test_all_attributes_of_a_dict_are_read(tmp_path, turned):
    states = [b"}" + text("a") + BAD + b"sb", b"}" + text("b") + GOOD + b"sb"]
    raw = b"ccollections\nOrderedDict\n)R" + b"".join(reversed(states) if turned else states)
    path = archive(tmp_path / "x.pt", raw)
    assert torch.load(path).a.isnan().any()
    assert [name for name, *_ in inspect(path).bad] == ["a"]


@pytest.mark.parametrize("name", ["torch.Tensor", "torch.FloatTensor"])
@pytest.mark.parametrize("make", [b"\x81", b"R"], ids=["new object", "call"])
def test_a_tensor_made_from_a_list_is_refused(tmp_path, name, make):
    made = b"c" + name.replace(".", "\n").encode() + b"\n]G" + struct.pack(">d", NAN) + b"a\x85"
    path = archive(tmp_path / "x.pt", b"}" + text("w") + made + make + b"s")
    assert torch.load(path)["w"].isnan().all()
    with pytest.raises(UnsafeFile, match=f"would call {name}"):
        inspect(path)


UNLOADABLE = {
    "a device without a name": b"ctorch\ndevice\n)R",
    "bytes in UTF-16": call("_codecs.encode", text("x"), text("utf-16")),
    "a parameter made from a list": b"ctorch._utils\n_rebuild_parameter\n]\x89}\x87R",
    "a list in a key": b"}](Ne\x85" + GOOD + b"s",
    "a list in a set": call("__builtin__.set", b"](]e"),
    "a set with append": b"\x8fNa",
    "a list with add": b"](N\x90",
}


@pytest.mark.parametrize("place", ["", "1.w", "cuda:", "cpu cpu"])
def test_a_storage_is_on_a_device(tmp_path, place):
    path = archive(tmp_path / "x.pt", GOOD.replace(text("cpu"), text(place)))
    with pytest.raises(RuntimeError):
        torch.load(path)
    with pytest.raises(DamagedFile, match="a storage on an invalid device"):
        inspect(path)


@pytest.mark.parametrize("place", ["cuda:3", "mps", "npu:0", "privateuseone:1"])
def test_a_storage_may_be_on_a_device_that_this_machine_lacks(tmp_path, place):
    path = archive(tmp_path / "x.pt", GOOD.replace(text("cpu"), text(place)))
    assert inspect(path).bad == ()


@pytest.mark.parametrize("name", UNLOADABLE)
def test_a_file_that_no_reader_can_load_is_damaged(tmp_path, name):
    path = archive(tmp_path / "x.pt", UNLOADABLE[name])
    if name != "bytes in UTF-16":
        with pytest.raises((AttributeError, TypeError)):
            torch.load(path, weights_only=False)
    with pytest.raises(DamagedFile):
        inspect(path)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2).to(torch.float8_e5m2),
        torch.ones(2, dtype=torch.uint16),
        torch.ones(2).untyped_storage(),
    ],
    ids=["float8", "uint16", "storage"],
)
def test_storages_without_a_type_cannot_be_loaded_from_the_old_format(tmp_path, value):
    torch.save({"w": value}, tmp_path / "x.pt")
    assert inspect(tmp_path / "x.pt").bad == ()
    torch.save({"w": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    for weights_only in (True, False):
        with pytest.raises(AttributeError, match="dtype"):
            torch.load(tmp_path / "x.pt", weights_only=weights_only)
    with pytest.raises(DamagedFile, match="without an element type, which torch cannot load"):
        inspect(tmp_path / "x.pt")


REFUSED = {
    "opcode DUP": b"](" + GOOD + b"2e",
    "opcode SHORT_BINUNICODE": b"}\x8c\x01a" + GOOD + b"s",
    "opcode FRAME": b"\x95" + bytes(8) + b"}" + text("a") + GOOD + b"s",
    "opcode LONG": b"}L12L\n" + GOOD + b"s",
    "text that is not UTF-8": b"}" + python2(b"\xe9") + GOOD + b"s",
}


@pytest.mark.parametrize("what", REFUSED)
def test_opcodes_that_weights_only_refuses_are_named(tmp_path, capsys, what):
    path = archive(tmp_path / "x.pt", REFUSED[what])
    with pytest.raises((UnicodeDecodeError, Exception)):
        torch.load(path, weights_only=True)
    assert main(["ckpt", "verify", str(path)]) == 0
    assert f"torch.load(weights_only=True) refuses this file: {what}" in capsys.readouterr().out


def test_a_store_has_no_file_that_it_cannot_load(tmp_path):
    """The manifest matches the file, and Python's own unpickler would load it."""
    with CheckpointStore(tmp_path) as store:
        path = tmp_path / store.save(w=torch.ones(2), step=1).file
    torch.save(torch.load(path), path, pickle_protocol=4)
    body = json.loads((tmp_path / manifest.NAME).read_text())
    body["checkpoints"][0] |= {"sha256": sha256_of(path), "size": path.stat().st_size}
    body["sha256"] = manifest._digest(body)
    (tmp_path / manifest.NAME).write_text(json.dumps(body))
    with CheckpointStore(tmp_path, read_only=True) as store:
        (check,) = store.verify()
        assert not check.ok and "torch.load(weights_only=True) refuses opcode" in check.problem
        with pytest.raises(DamagedFile):
            store.load()
