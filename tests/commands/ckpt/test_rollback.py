"""What `ckpt rollback` says: why this file, how to undo it, and what to type instead."""

import os

import pytest
import torch

from fastguard import CheckpointStore
from guardtest.commands import ckpt

NAN = float("nan")


def write(path, value=1.0, *, modified=None, **more):
    torch.save({"weight": torch.full((3,), value), **more}, path)
    if modified is not None:
        os.utime(path, (modified, modified))
    return path


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "run") as opened:
        for step in (10, 20, 30):
            opened.save(m={"w": torch.full((400,), float(step))}, step=step)
    return tmp_path / "run"


def test_a_folder_is_nothing_to_copy(tmp_path, capsys):
    last = write(tmp_path / "last.pt", NAN)
    status, _, err = ckpt(capsys, "rollback", last, "--to", tmp_path)
    assert status == 2
    assert f"--to {tmp_path} is a folder; pass a file in it" in err


def test_a_source_that_lies_beside_the_target_is_pointed_at(tmp_path, capsys):
    last, best = write(tmp_path / "last.pt", NAN), write(tmp_path / "best.pt")
    status, _, err = ckpt(capsys, "rollback", last, "--to", "best.pt")
    assert status == 2
    assert f"best.pt does not exist in the current folder; did you mean --to {best}?" in err


def test_a_good_file_that_is_replaced_by_a_named_one_is_said_too(tmp_path, capsys):
    last, best = write(tmp_path / "last.pt"), write(tmp_path / "best.pt", 2.0)
    _, out, _ = ckpt(capsys, "rollback", last, "--to", best)
    assert f"complete and finite too; to undo: --to {last}.replaced-1" in out


def test_without_epoch_and_step_the_time_decides_and_that_is_said(tmp_path, capsys):
    write(tmp_path / "last.pt", NAN)
    write(tmp_path / "a.pt", modified=50)
    write(tmp_path / "b.pt", modified=20)
    _, out, _ = ckpt(capsys, "rollback", tmp_path)
    assert "is now a copy of" in out and "a.pt" in out
    assert "it contains no epoch or step; it was chosen by modification time" in out


def test_the_step_decides_where_there_is_no_epoch(tmp_path, capsys):
    write(tmp_path / "last.pt", NAN, step=300)
    write(tmp_path / "a.pt", step=100, modified=50)
    write(tmp_path / "b.pt", step=200, modified=20)
    write(tmp_path / "c.pt", step=400, modified=10)
    _, out, _ = ckpt(capsys, "rollback", tmp_path)
    assert "passed over c.pt: is from step 400, later than step 300" in out
    assert "b.pt (step 200)" in out and "chosen by its time" not in out


def test_a_damaged_checkpoint_that_is_put_aside_is_not_called_clean(store, capsys):
    with CheckpointStore(store, read_only=True) as opened:
        file = opened.last().file
    os.truncate(store / file, 50)
    status, out, err = ckpt(capsys, "rollback", store)
    assert status == 0
    assert "put aside" in out and f"{file} (step 30, damaged)" in out
    assert "rolled back to" not in err  # once is enough


def test_problems_in_a_store_name_the_file_once(store, capsys):
    with CheckpointStore(store, read_only=True) as opened:
        path = store / opened.last().file
    os.truncate(path, 50)
    _, out, _ = ckpt(capsys, "verify", store)
    assert out.count(str(path)) == 1


def test_a_store_in_use_says_what_a_user_of_the_command_can_do(store, capsys):
    with CheckpointStore(store):
        status, _, err = ckpt(capsys, "rollback", store)
    assert status == 2
    assert "read_only" not in err
    assert "end that run first; list and verify work meanwhile" in err


def test_a_file_of_a_store_is_rolled_back_by_its_store(store, capsys):
    with CheckpointStore(store, read_only=True) as opened:
        path = store / opened.list()[1].file
    status, _, err = ckpt(capsys, "rollback", path)
    assert status == 2
    assert f"is a checkpoint of a store; use: fastguard ckpt rollback {store} --to STEP" in err


def test_one_checkpoint_is_not_several(store, caplog):
    (store / "manifest.json").unlink()
    with CheckpointStore(store) as opened:
        for entry in opened.list()[1:]:
            (store / entry.file).unlink()
    (store / "manifest.json").unlink()
    caplog.clear()
    CheckpointStore(store).close()
    assert "rebuilt from 1 checkpoint" in caplog.text
    assert "1 checkpoints" not in caplog.text
