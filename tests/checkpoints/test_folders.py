"""Folders as frameworks leave them: settings beside weights, names of all kinds, subfolders."""

import os

import pytest
import torch

from fastguard.checkpoints import CheckpointError, contents, roll_back_file
from fastguard.cli import main

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


def ckpt(capsys, *arguments):
    status = main(["ckpt", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# A file without a tensor


@pytest.mark.parametrize("settings", [{"lr": 0.1}, {}, {"last_epoch": 9, "epoch": 9}], ids=str)
def test_settings_never_take_the_place_of_weights(tmp_path, capsys, settings):
    last = write(tmp_path / "last.pt", NAN, modified=1)
    good = write(tmp_path / "step20000.pt", step=20000, modified=2)
    torch.save(settings, tmp_path / "args.pt")
    status, out, _ = ckpt(capsys, "rollback", tmp_path)
    assert status == 0
    assert "passed over args.pt: holds no tensors" in out
    assert last.read_bytes() == good.read_bytes()


@pytest.mark.parametrize("damaged", [False, True], ids=["nan", "truncated"])
def test_a_folder_of_weights_alone_has_nothing_to_go_back_to(tmp_path, capsys, damaged):
    weights = write(tmp_path / "pytorch_model.bin", NAN)
    if damaged:
        os.truncate(weights, 300)
    torch.save({"last_epoch": 3}, tmp_path / "scheduler.pt")
    before = weights.read_bytes()
    status, out, err = ckpt(capsys, "rollback", weights)
    assert status == 1
    assert "passed over scheduler.pt: holds no tensors" in out
    assert "no good checkpoint beside" in err
    assert weights.read_bytes() == before


def test_settings_are_no_source_when_named_either(tmp_path, capsys):
    last, args = write(tmp_path / "last.pt", NAN), tmp_path / "args.pt"
    torch.save({"lr": 0.1}, args)
    with pytest.raises(CheckpointError, match=r"cannot be rolled back to: holds no tensors"):
        roll_back_file(last, args)
    assert ckpt(capsys, "rollback", last, "--to", args)[0] == 1


def test_verify_says_of_a_file_without_tensors_that_it_has_none(tmp_path, capsys):
    torch.save({"lr": 0.1}, tmp_path / "args.pt")
    status, out, _ = ckpt(capsys, "verify", tmp_path / "args.pt")
    assert (status, out) == (0, f"ok   {tmp_path / 'args.pt'}: holds no tensors\n")


def test_what_lies_beside_weights_does_not_take_the_place_of_damaged_ones(tmp_path, capsys):
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
    """Four files, of which the first cannot be opened. Root may open anything, so it is played."""
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0), ("last", NAN)):
        write(tmp_path / f"{name}.pt", value, modified=100 - ord(name[0]))

    def refuse(path, *rest):
        if os.fspath(path).endswith("a.pt"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return open(path, *rest)

    monkeypatch.setattr(contents, "open", refuse, raising=False)
    return tmp_path


def test_verify_reads_the_others_and_names_the_unreadable_one(forbidden, capsys):
    status, out, err = ckpt(capsys, "verify", forbidden)
    lines = [line for line in out.splitlines() if not line.startswith(" ")]
    assert (status, err) == (1, "")
    assert lines[0] == f"BAD  {forbidden / 'a.pt'}: cannot be read: Permission denied"
    assert [line[:4] for line in lines] == ["BAD ", "ok  ", "ok  ", "BAD "]


def test_list_has_a_row_for_the_unreadable_one(forbidden, capsys):
    status, out, _ = ckpt(capsys, "list", forbidden)
    assert status == 1
    assert [f"{name}.pt" in row for name, row in zip("abc", out.splitlines()[1:4], strict=True)]
    assert f"BAD  {forbidden / 'a.pt'}: cannot be read: Permission denied" in out


def test_rollback_passes_over_the_unreadable_one(forbidden, capsys):
    status, out, _ = ckpt(capsys, "rollback", forbidden)
    assert status == 0
    assert "passed over a.pt: cannot be read: Permission denied" in out
    assert "is now a copy of" in out and "b.pt" in out


def test_a_link_to_nothing_is_a_bad_row(tmp_path, capsys):
    write(tmp_path / "good.pt")
    (tmp_path / "best.pt").symlink_to(tmp_path / "gone.pt")
    status, out, _ = ckpt(capsys, "verify", tmp_path)
    assert status == 1
    assert "best.pt: cannot be read: No such file or directory" in out and "ok  " in out
    assert ckpt(capsys, "list", tmp_path)[0] == 1
