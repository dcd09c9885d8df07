"""Crafted files: tensors that extend past their storage, archives in pieces."""

import collections
import io
import json
import pickle
import struct
import zipfile

import pytest
import torch

from fastguard.checkpoints import DamagedFile, inspect
from fastguard.checkpoints.reading import safetensors_header as safetensors

NAN = float("nan")


class Storage:
    """Is pickled as a reference to record `data/0`."""


class Tensor:
    """Is pickled as a tensor over that storage."""

    def __init__(self, offset, size, stride):
        self.view = offset, size, stride

    def __reduce__(self):
        hooks = collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, (Storage(), *self.view, False, hooks)


def write(path, tree, values, **replaced):
    """Writes an archive like `torch.save`, of float32 `values`."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", len(values))

    tree_bytes = io.BytesIO()
    Pickler(tree_bytes, protocol=2).dump(tree)
    records = {
        "data.pkl": tree_bytes.getvalue(),
        "data/0": struct.pack(f"<{len(values)}f", *values),
    }
    records |= {"byteorder": b"little", "version": b"3\n", **replaced}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in records.items():
            if raw is not None:
                archive.writestr(f"x/{name}", raw)
    return path


def test_a_written_archive_is_read_like_a_torch_file(tmp_path):
    path = write(tmp_path / "x.pt", {"w": Tensor(1, (3,), (1,))}, [NAN, 1.0, 2.0, NAN])
    assert inspect(path).bad == (("w", 1, 0, 0),)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 3), (3, 1)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
        (0, (-2,), (1,)),
    ],
    ids=str,
)
def test_a_tensor_that_extends_past_its_storage_is_damage(tmp_path, offset, size, stride):
    path = write(tmp_path / "x.pt", {"w": Tensor(offset, size, stride)}, [1.0] * 4)
    with pytest.raises(DamagedFile, match="w extends past its storage of 16 bytes"):
        inspect(path)


def test_views_with_the_same_start_are_different_tensors(tmp_path):
    base = torch.ones(6)
    base[2] = NAN
    torch.save({"a": base[:2], "b": base[0:4:2]}, tmp_path / "x.pt")
    assert inspect(tmp_path / "x.pt").bad == (("b", 1, 0, 0),)


def test_the_error_of_an_archive_that_is_not_a_checkpoint_has_the_reason(tmp_path):
    path, tree = tmp_path / "x.pt", {"w": Tensor(0, (4,), (1,))}
    write(path, tree, [1.0] * 4, byteorder=b"big")
    with pytest.raises(DamagedFile, match="big-endian"):
        inspect(path)
    write(path, tree, [1.0] * 4, **{"data.pkl": None})
    with pytest.raises(DamagedFile, match=r"it has no data\.pkl"):
        inspect(path)
    with zipfile.ZipFile(write(path, tree, [1.0] * 4)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in records.items():
            archive.writestr(name, raw)
    with pytest.raises(DamagedFile, match=r"record data\.pkl is compressed"):
        inspect(path)


def test_a_record_that_extends_past_the_file_means_truncation(tmp_path):
    path = write(tmp_path / "x.pt", {"w": Tensor(0, (4,), (1,))}, [1.0] * 4)
    raw = bytearray(path.read_bytes())
    # The second entry of the directory: data/0.
    entry = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 1)
    header = raw.index(b"PK\x03\x04", raw.index(b"PK\x03\x04") + 1)
    for sizes in (entry + 20, header + 18):  # compressed and uncompressed size
        struct.pack_into("<II", raw, sizes, 10**6, 10**6)
    path.write_bytes(raw)
    with pytest.raises(DamagedFile, match="truncated: record data/0 extends past the end"):
        inspect(path)


def write_safetensors(path, data, **entries):
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in entries.items()
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_may_name_its_tensors_in_any_order(tmp_path):
    data = struct.pack("<4f", 1.0, NAN, 1.0, NAN)
    entries = {"z": ("F32", [2], [8, 16]), "a": ("F32", [2], [0, 8]), "none": ("F32", [0], [0, 0])}
    path = write_safetensors(tmp_path / "x.safetensors", data, **entries)
    assert inspect(path).bad == (("a", 1, 0, 0), ("z", 1, 0, 0))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (("F32", [2], [-8, 0]), r"w of shape \[2\] has 8 bytes"),
        (("F32", [-1, -2], [0, 8]), r"w of shape \[-1, -2\] has 8 bytes"),
        (("F32", [2], [0, 12]), r"w of shape \[2\] has 12 bytes"),
        (("F32", [8], [0, 32]), "w extends past the end of the file"),
        (("F99", [2], [0, 8]), "w has dtype F99, which is not supported"),
    ],
    ids=str,
)
def test_errors_of_invalid_safetensors_name_the_tensor(tmp_path, entry, says):
    path = write_safetensors(tmp_path / "x.safetensors", bytes(16), w=entry)
    with pytest.raises(DamagedFile, match=says):
        inspect(path)


def test_a_header_of_millions_of_brackets_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "_MAX_MARKS", 11)
    path = write_safetensors(tmp_path / "x.safetensors", bytes(8), w=("F32", [2], [0, 8]))
    assert inspect(path).contents.n_tensors == 1  # 2 braces, 4 colons, 3 commas, 2 brackets
    monkeypatch.setattr(safetensors, "_MAX_MARKS", 10)
    with pytest.raises(DamagedFile, match="JSON is too large: 11 brackets, colons and commas"):
        inspect(path)


@pytest.mark.parametrize("n", [65, 100_000])
def test_a_shape_of_many_dimensions_is_an_error(tmp_path, n):
    entry = ("F32", [1] * n, [0, 4])
    path = write_safetensors(tmp_path / "x.safetensors", bytes(4), w=entry)
    with pytest.raises(DamagedFile, match=f"w has {n:,} dimensions; torch supports at most"):
        inspect(path)


def test_safetensors_headers_may_be_as_long_as_the_format_allows(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path / "x.safetensors", bytes(8), w=("F32", [2], [0, 8]))
    n_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(safetensors, "_MAX_HEADER", n_bytes)
    assert inspect(path).contents.n_tensors == 1
    monkeypatch.setattr(safetensors, "_MAX_HEADER", n_bytes - 1)
    with pytest.raises(DamagedFile, match=f"a header of {n_bytes} bytes"):
        inspect(path)


@pytest.mark.parametrize("n_bytes", [1, 3], ids=["less than {}", "more than there is"])
def test_a_wrong_length_of_a_safetensors_header_is_damage(tmp_path, n_bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")  # the header ends with the file
    assert inspect(path).contents.n_tensors == 0
    path.write_bytes(struct.pack("<Q", n_bytes) + b"{}")
    with pytest.raises(DamagedFile, match=f"a header of {n_bytes} bytes"):
        inspect(path)
