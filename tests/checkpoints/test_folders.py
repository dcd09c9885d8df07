"""Folders as frameworks write them: settings next to weights, many names, subfolders."""

import os
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fastguard import CheckpointStore
from fastguard.checkpoints import CheckpointError, roll_back_file
from guardtest.commands import ckpt

NAN = float("nan")


def write(path, value=1.0, *, step=None, modified=None, optimizer=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"weight": torch.full((3,), value), "bias": torch.full((2,), 1.0)}
    if step is not None:
        state["step"] = step
    if optimizer:
        state["optimizer"] = {"state": {}}
    torch.save(state, path)
    if modified is not None:
        os.utime(path, (modified, modified))
    return path


# A file without a tensor


@pytest.mark.parametrize("settings", [{"lr": 0.1}, {}, {"last_epoch": 9, "epoch": 9}], ids=str)
def test_settings_never_replace_weights(tmp_path, capsys, settings):
    last = write(tmp_path / "last.pt", NAN, modified=1)
    good = write(tmp_path / "step20000.pt", modified=2)
    torch.save(settings, tmp_path / "args.pt")
    status, out, _ = ckpt(capsys, "rollback", tmp_path)
    assert status == 0
    assert "passed over args.pt: holds no tensors" in out
    assert last.read_bytes() == good.read_bytes()


@pytest.mark.parametrize("damaged", [False, True], ids=["nan", "truncated"])
def test_a_folder_with_only_weights_has_no_checkpoint_to_roll_back_to(tmp_path, capsys, damaged):
    weights = write(tmp_path / "pytorch_model.bin", NAN)
    if damaged:
        os.truncate(weights, 300)
    torch.save({"last_epoch": 3}, tmp_path / "scheduler.pt")
    before = weights.read_bytes()
    status, out, err = ckpt(capsys, "rollback", weights)
    assert status == 1
    assert "passed over scheduler.pt: holds no tensors" in out
    assert "no good checkpoint next to" in err
    assert weights.read_bytes() == before


def test_settings_are_not_a_source_even_if_the_user_names_them(tmp_path, capsys):
    last, args = write(tmp_path / "last.pt", NAN), tmp_path / "args.pt"
    torch.save({"lr": 0.1}, args)
    with pytest.raises(CheckpointError, match=r"cannot be used for a rollback: holds no tensors"):
        roll_back_file(last, args)
    assert ckpt(capsys, "rollback", last, "--to", args)[0] == 1


def test_verify_reports_a_file_without_tensors(tmp_path, capsys):
    torch.save({"lr": 0.1}, tmp_path / "args.pt")
    status, out, _ = ckpt(capsys, "verify", tmp_path / "args.pt")
    assert (status, out) == (0, f"ok   {tmp_path / 'args.pt'}: holds no tensors\n")


def test_other_files_do_not_replace_damaged_weights(tmp_path, capsys):
    weights = write(tmp_path / "pytorch_model.bin", NAN)
    os.truncate(weights, 300)
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    status, out, _ = ckpt(capsys, "rollback", weights)
    assert status == 1
    assert "passed over optimizer.pt: holds no weights" in out
    assert "passed over rng_state.pth: holds no weights" in out


# A file that cannot be opened


@pytest.fixture
def forbidden(tmp_path, monkeypatch):
    """Four files, the first of which cannot be opened; simulated, since root can open anything."""
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0), ("last", NAN)):
        write(tmp_path / f"{name}.pt", value, modified=100 - ord(name[0]))

    open_now = os.open

    def refuse(path, *rest, **named):
        if os.fspath(path).endswith("a.pt"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return open_now(path, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    return tmp_path


def test_verify_names_the_unreadable_file_and_reads_the_others(forbidden, capsys):
    status, out, err = ckpt(capsys, "verify", forbidden)
    lines = [line for line in out.splitlines() if not line.startswith(" ")]
    assert (status, err) == (1, "")
    assert lines[0] == f"BAD  {forbidden / 'a.pt'}: cannot be read: Permission denied"
    assert [line[:4] for line in lines] == ["BAD ", "ok  ", "ok  ", "BAD "]


def test_list_has_a_row_for_the_unreadable_file(forbidden, capsys):
    status, out, _ = ckpt(capsys, "list", forbidden)
    assert status == 1
    assert [f"{name}.pt" in row for name, row in zip("abc", out.splitlines()[1:4], strict=True)]
    assert f"BAD  {forbidden / 'a.pt'}: cannot be read: Permission denied" in out


def test_rollback_skips_the_unreadable_file(forbidden, capsys):
    status, out, _ = ckpt(capsys, "rollback", forbidden)
    assert status == 0
    assert "passed over a.pt: cannot be read: Permission denied" in out
    assert "is now a copy of" in out and "b.pt" in out


def test_a_link_to_nothing_is_a_bad_row(tmp_path, capsys):
    write(tmp_path / "good.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "one.pt")
    (tmp_path / "best.pt").symlink_to(tmp_path / "gone.pt")
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    assert status == 1
    assert "best.pt: cannot be read: No such file or directory" in out
    assert "good.pt: 2 tensors, all finite" in out and "one.pt: 1 tensor, all finite" in out
    assert ckpt(capsys, "list", tmp_path)[0] == 1


# Names and subfolders


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pth.tar", "LAST.PT", "a.Ckpt", "checkpoint.pt.tar", "x.PTH"],
)
def test_checkpoints_have_many_names(tmp_path, capsys, name):
    write(tmp_path / "optimizer.pt")
    write(tmp_path / name, NAN)
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    assert status == 1
    assert f"BAD  {tmp_path / name}: 1 of 2 tensors" in out
    assert name in ckpt(capsys, "list", tmp_path)[1]


def test_a_bin_that_is_not_a_torch_file_is_skipped_and_reported(tmp_path, capsys):
    (tmp_path / "train.bin").write_bytes(bytes(range(7, 100)))
    (tmp_path / "training_args.bin").write_bytes(b"PK")
    write(tmp_path / "ckpt.pt")
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    assert status == 0
    assert f"skip {tmp_path / 'train.bin'}: does not begin like a torch file" in out
    assert f"skip {tmp_path / 'training_args.bin'}: settings of the Hugging Face Trainer" in out


@pytest.mark.parametrize("raw", [b"", bytes(4000)], ids=["empty", "zeros"])
def test_a_bin_of_zeros_after_a_lost_write_is_bad(tmp_path, capsys, raw):
    (tmp_path / "pytorch_model.bin").write_bytes(raw)
    write(tmp_path / "optimizer.pt")
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    assert (status, out.count("BAD ")) == (1, 1)


def test_verify_includes_subfolders_and_their_stores(tmp_path, capsys):
    write(tmp_path / "hfout" / "checkpoint-500" / "pytorch_model.bin", NAN)
    write(tmp_path / "lv" / "version_0" / "checkpoints" / "epoch=1.ckpt")
    write(tmp_path / ".cache" / "old.pt", NAN)
    with CheckpointStore(tmp_path / "store") as store:
        file = store.save(m={"w": torch.full((2,), NAN)}, step=1).file
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    told = [line.split(": ")[0].split()[-1] for line in out.splitlines() if line[0] != " "]
    assert status == 1
    assert [os.path.relpath(path, tmp_path) for path in told] == [
        "hfout/checkpoint-500/pytorch_model.bin",
        "lv/version_0/checkpoints/epoch=1.ckpt",
        f"store/{file}",
    ]


def test_list_and_rollback_read_one_folder_and_name_its_subfolders(tmp_path, capsys):
    write(tmp_path / "checkpoint-500" / "pytorch_model.bin", NAN)
    for action in ("list", "rollback"):
        status, _, err = ckpt(capsys, action, tmp_path)
        assert status == 2
        assert f"these subfolders do: {tmp_path / 'checkpoint-500'}" in err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_shards_are_reported_as_unread(tmp_path, capsys):
    shards = tmp_path / "run" / "step_10"
    dcp.save({"w": torch.ones(2)}, checkpoint_id=shards, no_dist=True)
    write(tmp_path / "run" / "good.pt")
    for path in (tmp_path, shards):
        status, out, _ = ckpt(capsys, "verify", path)
        assert status == 1
        assert f"skip {shards}: was written by torch.distributed.checkpoint" in out
        assert "dcp_to_torch_save" in out and "fastguard.CheckpointStore" in out
    for action in ("list", "rollback"):
        status, _, err = ckpt(capsys, action, shards)
        assert status == 2
        assert f"{shards} was written by torch.distributed.checkpoint" in err


def test_a_folder_that_cannot_be_entered_is_a_bad_row(tmp_path, capsys, monkeypatch):
    write(tmp_path / "a" / "x.pt")
    write(tmp_path / "b" / "y.pt")
    honest = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return honest(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    assert status == 1
    assert f"BAD  {tmp_path / 'a'}: cannot be read: Permission denied" in out
    assert f"ok   {tmp_path / 'b' / 'y.pt'}" in out


def test_rollback_without_a_last_file_explains_how_to_name_it(tmp_path, capsys):
    write(tmp_path / "model.pt", NAN)
    status, _, err = ckpt(capsys, "rollback", tmp_path)
    assert status == 2
    assert "has no last.pt" in err
    assert f"ckpt rollback {tmp_path / 'model.pt'}" in err and "--to" in err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_single_shard_cannot_be_verified(tmp_path, capsys):
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "step_10", no_dist=True)
    status, out, _ = ckpt(capsys, "verify", next((tmp_path / "step_10").glob("*.distcp")))
    assert status == 1
    assert "was written by torch.distributed.checkpoint" in out


STEP = "step-000000010.000001.sharded"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("name", "lost", "says"),
    [
        (STEP, ["__0_0.distcp"], "is one checkpoint of a store; pass the store instead: {}"),
        (
            STEP,
            ["__0_0.distcp", ".metadata"],
            "is one checkpoint of a store; pass the store instead: {}",
        ),
        ("step_10", ["__0_0.distcp"], "1 of 1 files is missing: __0_0.distcp"),
        ("step_10", [".metadata"], ".metadata is missing, without which"),
    ],
)
def test_a_folder_with_missing_shards_is_never_ok(tmp_path, capsys, monkeypatch, name, lost, says):
    folder = tmp_path / name
    dcp.save({"w": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    write(folder / "rest.pt")
    for file in lost:
        (folder / file).unlink()
    monkeypatch.chdir(folder)
    for given in (folder, "."):
        status, out, _ = ckpt(capsys, "verify", given)
        assert status == 1
        assert says.format(tmp_path) in out


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (["model-00001-of-00005.safetensors"], "4 of its 5 files are missing: 00002, 00003, 00004"),
        (["pytorch_model-00002-of-00002.bin"], "1 of its 2 files is missing: 00001"),
        (["w-00000-of-00003.pt", "w-00002-of-00003.pt"], "1 of its 3 files is missing: 00001"),
        (["a_1_of_2.ckpt", "a_2_of_2.ckpt", "b_2_of_2.ckpt"], "b_N_of_2.ckpt: 1 of its 2 files is"),
        (["model-00001-of-00002.pt", "model-00002-of-00002.pt"], None),
        (["best-of-10.pt", "epoch-3-of-the-run.pt"], None),
    ],
)
def test_numbered_files_that_are_missing_are_reported(tmp_path, capsys, there, says):
    for name in there:
        write(tmp_path / name)
        if name.endswith(".safetensors"):
            (tmp_path / name).write_bytes(b"\x02" + bytes(7) + b"{}")
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    assert status == (says is not None)
    assert says is None or re.search(f"BAD  {tmp_path}: .*{re.escape(says)}", out)
    status, out, _ = ckpt(capsys, "verify", tmp_path / there[0])
    assert ("is one file of several" in out) == ("of-0000" in there[0] or "_of_" in there[0])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_without_metadata_report_the_missing_ranks(tmp_path, capsys):
    for rank in (0, 1, 4):
        (tmp_path / f"__{rank}_0.distcp").write_bytes(b"PK")
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    assert status == 1 and ".metadata is missing" in out and "so are the files of rank 2, 3" in out
    (tmp_path / ".metadata").write_bytes(b"\x80\x04garbage")
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    assert status == 1 and "BAD" in out and "Traceback" not in out


def test_metadata_of_another_program_does_not_mark_shards(tmp_path, capsys):
    write(tmp_path / "a.pt")
    (tmp_path / ".metadata").write_text("version:\n  channel: stable\n")
    assert ckpt(capsys, "verify", tmp_path)[0] == 0
