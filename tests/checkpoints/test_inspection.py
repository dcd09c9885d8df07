"""NaN is found in foreign files of all formats and dtypes, and at any position."""

import contextlib
import gzip
import json
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard.checkpoints import DamagedFile, UnsafeFile, inspect
from fastguard.checkpoints.reading import inspect_file as module
from fastguard.checkpoints.reading.contents import read_contents

NAN, INF = float("nan"), float("inf")
FLOATS = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def ids(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(params=["zip", "legacy"])
def saved(request, tmp_path):
    def save(value):
        path = tmp_path / "file.pt"
        torch.save(value, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    save.loses_types = request.param == "legacy"
    return save


@pytest.fixture
def saved_in(saved):
    """Like `saved`, for values of a dtype; skips the test if torch cannot load what it saved."""

    def save(dtype, value):
        path = saved(value)
        if saved.loses_types and dtype not in torch.storage._dtype_to_storage_type_map():
            with pytest.raises(DamagedFile, match="torch cannot load"):
                inspect(path)
            pytest.skip("the format before 1.6 has no storage of this dtype")
        return path

    return save


def write_safetensors(path, tensors, shift=0):
    """Writes a safetensors file; `shift` misaligns the data by padding the header."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, data = {"__metadata__": {"epoch": "7"}}, b""
    for name, t in tensors.items():
        raw = t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + shift)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_nan_in_the_last_element_of_any_dtype(saved_in, dtype):
    x = torch.ones(1001).to(dtype)
    x[-1] = NAN
    path = saved_in(dtype, {"fine": torch.ones(7).to(dtype), "model": [{"w": x}]})
    assert inspect(path).bad == (("model.0.w", 1, 0, 0),)


def test_nan_and_infinities_are_counted_separately(saved):
    x = torch.tensor([NAN, INF, -INF, INF, 1.0, 0.0])
    assert inspect(saved([x, torch.tensor([2, 3]), torch.tensor(True)])).bad == (("0", 1, 2, 1),)


def test_large_finite_values_are_finite(saved):
    path = saved(
        [
            torch.full((9,), 3e38),
            torch.full((5000,), 6e4).half(),
            torch.tensor(-1e308, dtype=torch.float64),
        ]
    )
    assert inspect(path).bad == ()


def test_four_bit_floats_have_no_nan(saved_in):
    packed = torch.full((4,), 0x77, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert inspect(saved_in(packed.dtype, {"x": packed})).bad == ()


@pytest.mark.parametrize(
    "place",
    [(0,), (-1,), (module.PIECE // 4 - 1,), (module.PIECE // 4,), (module.PIECE // 4 + 40,)],
    ids=str,
)
def test_values_at_the_borders_of_pieces(saved, place):
    x = torch.zeros(3 * module.PIECE // 4 + 17)
    x[list(place)] = NAN
    y = torch.zeros(5, dtype=torch.float64)
    assert inspect(saved({"y": y, "x": x})).bad == (("x", 1, 0, 0),)


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("value", [complex(0, NAN), complex(-INF, 0)], ids=["imag", "real"])
def test_wide_elements_that_span_two_pieces_are_found(saved, monkeypatch, place, value):
    monkeypatch.setattr(module, "PIECE", 24)  # 1.5 elements
    x = torch.zeros(8, dtype=torch.complex128)
    x[place] = value
    counts = (1, 0, 0) if value != value else (0, 0, 1)
    assert inspect(saved({"x": x})).bad == (("x", *counts),)


def test_a_column_in_several_pieces_is_counted_once(saved, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 64)
    base = torch.zeros(40, 4)
    base[::7, 1] = NAN
    path = saved({"beside": base[:, 0], "column": base[:, 1]})
    assert inspect(path).bad == (("column", 6, 0, 0),)


@given(st.data())
@settings(max_examples=25)
def test_any_bytes_split_anywhere_are_counted_as_torch_counts_them(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))
    draw = st.sampled_from([0.0, 1.5, NAN, INF, -INF])
    kinds = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
    tensors = {}
    for i, n in enumerate(sizes):
        values = data.draw(st.lists(draw, min_size=n, max_size=n))
        tensors[f"t{i}"] = torch.tensor(values).to(data.draw(kinds))
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    write_safetensors(path, tensors, shift=data.draw(st.integers(0, 7)))
    expected = [
        (name, int(t.isnan().sum()), int(t.isposinf().sum()), int(t.isneginf().sum()))
        for name, t in tensors.items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", data.draw(st.integers(16, 70)))
        assert list(inspect(path).bad) == [row for row in expected if any(row[1:])]


def test_only_elements_of_the_view_count(saved):
    base = torch.zeros(10, 4)
    base[:, 1] = NAN
    path = saved({"column": base[:, 0], "transposed": base[:, 2:].T, "row": base[3, 2:]})
    assert inspect(path).bad == ()
    base[9, 0] = INF
    assert inspect(saved({"column": base[:, 0], "rows": base[5:]})).bad == (
        ("column", 0, 1, 0),
        ("rows", 5, 1, 0),
    )
    assert inspect(saved({"same": torch.tensor(NAN).expand(6)})).bad == (("same", 6, 0, 0),)


def test_permuted_tensors_are_dense(saved):
    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    x[1, 2, 3, 4] = NAN
    path = saved({"x": x})
    assert read_contents(path).spans[0].dense
    assert inspect(path).bad == (("x", 1, 0, 0),)


def test_a_tied_tensor_is_checked_once(saved):
    x = torch.tensor([NAN, 1.0])
    assert inspect(saved({"embed": x, "head": x})).bad == (("embed", 1, 0, 0),)


def test_empty_and_scalar_and_sparse_tensors_and_arrays(saved):
    sparse = torch.sparse_coo_tensor(
        [[0, 2]], torch.tensor([1.0, NAN]), (4,), check_invariants=True
    )
    path = saved(
        {
            "none": torch.empty(0, 3),
            "scalar": torch.tensor(NAN),
            "sparse": sparse,
            "array": np.array([1.0, np.inf, np.nan]),
        }
    )
    assert {name: counts for name, *counts in inspect(path).bad} == {
        "scalar": [1, 0, 0],
        "sparse.1": [1, 0, 0],
        "array": [1, 1, 0],
    }


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("channels", [False, True], ids=["tensor", "channel"])
def test_the_scale_of_a_quantized_tensor_counts(saved, channels, value):
    def quantized(scale):
        integers = torch.ones(3, 2, dtype=torch.int8)
        if not channels:
            return torch._make_per_tensor_quantized_tensor(integers, scale, 0)
        scales, zeros = torch.tensor([0.1, scale, 0.1]), torch.zeros(3, dtype=torch.long)
        return torch._make_per_channel_quantized_tensor(integers, scales, zeros, 0)

    assert inspect(saved({"model": {"weight": quantized(0.1)}})).bad == ()
    found = inspect(saved({"model": {"weight": quantized(value)}}))
    assert found.bad == (("model.weight.scale", int(value != value), int(value == INF), 0),)


def test_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(
        path,
        {"a": torch.ones(3), "b.c": torch.tensor([[1.0, -INF]]).half(), "n": torch.tensor([7])},
    )
    found = inspect(path, sha256=True)
    assert found.bad == (("b.c", 0, 0, 1),)
    assert found.contents.metadata == {"epoch": "7"}
    expected = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert found.sha256 == expected.stdout.split()[0]


def test_a_flipped_byte_contradicts_the_checksums_in_the_file(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1000), "b": torch.ones(10)}, path)
    assert inspect(path).damaged == ()
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("x/data/0").header_offset
    raw = bytearray(path.read_bytes())
    raw[place + 400] ^= 4
    path.write_bytes(raw)
    assert inspect(path).damaged == ("data/0",)
    assert inspect(path, crc32=False).damaged == ()


def test_files_written_without_checksums_are_not_called_damaged(tmp_path):
    path = tmp_path / "x.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(1000)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert inspect(path).damaged == ()


@pytest.mark.parametrize("keep", [0, 3, 7, 100, 0.5, 0.9, -1])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_reported_as_such(tmp_path, kind, keep):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        write_safetensors(path, {"a": torch.ones(400)})
    else:
        torch.save({"a": torch.ones(400)}, path, _use_new_zipfile_serialization=kind == "zip")
    size = path.stat().st_size
    os.truncate(path, size - 1 if keep == -1 else int(size * keep) if 0 < keep < 1 else keep)
    with pytest.raises(DamagedFile, match=str(path)):
        inspect(path)


@given(st.binary(max_size=200), st.sampled_from(["x.pt", "x.safetensors"]))
@settings(max_examples=150)
def test_any_bytes_give_only_documented_errors(tmp_path_factory, raw, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(raw)
    with pytest.raises(DamagedFile):
        inspect(path)


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=150)
def test_changing_any_byte_gives_only_documented_errors(tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    torch.save({"epoch": 1, "model": torch.nn.Linear(3, 2).state_dict()}, path)
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] = value
    path.write_bytes(raw)
    with contextlib.suppress(DamagedFile, UnsafeFile):
        inspect(path)


def test_files_of_other_formats_are_reported_by_format(tmp_path):
    path = tmp_path / "x.pt"
    np.save(tmp_path / "x.npy", np.ones(3))
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    exported = torch.export.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),))
    torch.export.save(exported, tmp_path / "x.pt2")
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"x"))
    for ending, what in (
        ("npy", r"a numpy array \(\.npy\)"),
        ("npz", r"numpy arrays \(\.npz\)"),
        ("pt2", r"a torch\.export program \(\.pt2\)"),
        ("gz", "compressed with gzip"),
    ):
        path.write_bytes((tmp_path / f"x.{ending}").read_bytes())
        with pytest.raises(DamagedFile, match=f"{what}, not a torch or safetensors checkpoint"):
            inspect(path)


# ru_maxrss survives the exec, so it would begin with the memory of this process.
MEMORY = r"""
import re, sys
from pathlib import Path
from fastguard.checkpoints import inspect
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
inspect(sys.argv[1])
before = peak()
found = inspect(sys.argv[2], sha256=True)
assert found.bad == (("b", 1, 0, 0),), found.bad
print(peak() - before)
"""


@pytest.mark.parametrize("name", ["large.pt", "large.safetensors"])
def test_memory_is_below_that_of_the_largest_tensor(tmp_path, name):
    small, large = tmp_path / f"small{name}", tmp_path / name
    largest = 2**26  # bytes
    tensors = {key: torch.zeros(largest // 4) for key in "abc"}
    tensors["b"][-1] = NAN
    for path, content in ((small, {"b": tensors["b"][-9:].clone()}), (large, tensors)):
        if path.suffix == ".pt":
            torch.save(content, path)
        else:
            write_safetensors(path, content)
    command = [sys.executable, "-c", MEMORY, small, large]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes = float(done.stdout)
    print(f"verify of {large.stat().st_size / 2**20:.0f} MB used {megabytes:.1f} MB more")
    # Half the tensor; the documented bound is 1.2 times the tensor plus 64 MB.
    assert megabytes < 32


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_the_default_device_changes_nothing(saved_in, dtype):
    mask = torch.zeros(300, 300).masked_fill(torch.ones(300, 300).triu(1) > 0, -INF)
    tree = {"x": torch.tensor([1.0, NAN]).to(dtype), "attn_mask": mask, "a": np.array([INF])}
    path = saved_in(dtype, tree)
    expected = inspect(path)
    with torch.device("meta"):  # as after torch.set_default_device("cuda")
        found = inspect(path)
    assert (found.bad, found.meant) == (expected.bad, expected.meant)
