"""Models in several files, with tensors and files that the index names but that do not exist."""

import json
import os
import struct

import pytest
import torch

from fastguard.checkpoints import DamagedFile
from fastguard.checkpoints.index_files import check_index, is_index
from guardtest.commands import ckpt

PARTS = {"1": {"embed": torch.ones(2, 3), "empty": torch.ones(0)}, "2": {"head": torch.ones(3)}}


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def index(request, tmp_path):
    """A model in two files."""
    stem, ending = request.param.split(".")
    places = {}
    for part, tensors in PARTS.items():
        path = tmp_path / f"{stem}-0000{part}-of-00002.{ending}"
        write = write_safetensors if ending == "safetensors" else lambda p, t: torch.save(t, p)
        write(path, tensors)
        places |= dict.fromkeys(tensors, path.name)
    path = tmp_path / f"{request.param}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": places}))
    return path


def change(index, **places):
    found = json.loads(index.read_text())
    found["weight_map"] |= places
    index.write_text(json.dumps(found))


def second(index):
    return index.parent / json.loads(index.read_text())["weight_map"]["head"]


@pytest.mark.parametrize("whole", ["folder", "index"])
def test_a_complete_model_is_ok(index, capsys, whole):
    status, out, err = ckpt(capsys, "verify", index if whole == "index" else index.parent)
    assert (status, err) == (0, "")
    assert f"ok   {index}: 3 tensors, each present in the file named by the index" in out
    assert out.count("ok ") == 3


@pytest.mark.parametrize("whole", ["folder", "index"])
def test_a_missing_file_is_reported(index, capsys, whole):
    second(index).unlink()
    status, out, _ = ckpt(capsys, "verify", index if whole == "index" else index.parent)
    assert status == 1
    assert f"BAD  {index}: {second(index).name} is missing, with head" in out


def test_a_tensor_missing_from_its_file_is_reported(index, capsys):
    change(index, embed=second(index).name, tail=second(index).name)
    status, out, _ = ckpt(capsys, "verify", index.parent)
    assert status == 1
    assert f"BAD  {index}: {second(index).name} does not hold embed, tail" in out


def test_bad_tensors_in_the_files_of_an_index_are_found(index, capsys):
    second(index).unlink()
    torch.save({"head": torch.tensor([float("nan")] * 3)}, second(index).with_suffix(".bin"))
    change(index, head=second(index).with_suffix(".bin").name)
    status, out, _ = ckpt(capsys, "verify", index)
    assert status == 1 and f"ok   {index}" in out and "head (3 NaN)" in out


def test_a_tensor_that_shares_its_data_counts_as_present(tmp_path):
    tied = torch.ones(3)
    torch.save({"a": tied, "b": tied}, tmp_path / "pytorch_model.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys("ab", "pytorch_model.bin")}))
    assert check_index(index).problems == ()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "", "a\\b", "a\0b"])
def test_a_file_in_another_folder_is_an_error(index, name, capsys):
    change(index, head=name)
    with pytest.raises(DamagedFile, match="which is not in its folder"):
        check_index(index)
    status, out, _ = ckpt(capsys, "verify", index)
    assert status == 1 and "not in its folder" in out


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x.bin", "a": "y.bin"}}',
        '{"weight_map": {"a": NaN}}',
        "[" * 100_000,
        "\xff",
    ],
    ids=range(10),
)
def test_a_file_that_is_not_an_index_is_one_bad_row(tmp_path, capsys, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode("latin1"))
    status, out, err = ckpt(capsys, "verify", tmp_path)
    assert (status, out.count("BAD "), err) == (1, 1, "")
    assert f"BAD  {path}: " in out


def test_names_in_an_index_are_printed_as_text(index, capsys):
    change(index, **{"x\x1b[2J\nok": "y\x1b[2J\nok", "z\x1b[2J": second(index).name})
    status, out, _ = ckpt(capsys, "verify", index)
    assert status == 1 and "\x1b" not in out and "\nok" not in out.replace("\nok  ", "")


@pytest.mark.parametrize("whole", ["folder", "index"])
@pytest.mark.parametrize("kind", ["folder", "text", "itself"])
def test_an_unreadable_file_counts_as_missing_for_its_tensor(index, capsys, whole, kind):
    """This also holds for a file that is not named like a checkpoint."""
    name = index.name if kind == "itself" else "part"
    change(index, tail=name)
    if kind == "folder":
        (index.parent / name).mkdir()
    elif kind == "text":
        (index.parent / name).write_text("version https://git-lfs.example/spec/v1")
    status, out, _ = ckpt(capsys, "verify", index.parent if whole == "folder" else index)
    assert status == 1 and f"BAD  {index}: {name} cannot be read, with tail: " in out


def test_a_pipe_is_not_waited_for(index, capsys):
    second(index).unlink()
    os.mkfifo(second(index))
    status, out, _ = ckpt(capsys, "verify", index)
    assert status == 1 and "named pipe" in out
    index.unlink()
    os.mkfifo(index)
    for path in (index, index.parent):
        status, out, _ = ckpt(capsys, "verify", path)
        assert status == 1 and f"BAD  {index}: cannot be read: is a named pipe" in out


def test_an_index_is_never_rolled_back(index, capsys):
    good = second(index)
    before = index.read_bytes()
    for arguments in ((index,), (good, "--to", index)):
        status, _, err = ckpt(capsys, "rollback", *arguments)
        assert status == 2 and "is an index without tensors; pass one of the" in err
    assert index.read_bytes() == before
    status, out, _ = ckpt(capsys, "list", index)
    assert status == 0 and good.name in out


def test_names_of_indexes_are_recognized(tmp_path):
    yes = "model.safetensors.index.json diffusion.safetensors.index.fp16.json x.bin.index.json"
    no = "config.json index.json model.index.json model.safetensors .safetensors.index.json"
    assert all(is_index(tmp_path / name) for name in yes.split())
    assert not any(is_index(tmp_path / name) for name in no.split())
