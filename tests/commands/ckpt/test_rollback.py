"""Messages of `ckpt rollback` say why a file was chosen, how to undo a rollback, and what to
fix."""

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


def test_a_folder_cannot_be_the_source(tmp_path, capsys):
    last = write(tmp_path / "last.pt", NAN)
    status, _, err = ckpt(capsys, "rollback", last, "--to", tmp_path)
    assert status == 2
    assert f"--to {tmp_path} is a folder; pass a file in it" in err


def test_a_source_in_the_folder_of_the_target_is_suggested(tmp_path, capsys):
    last, best = write(tmp_path / "last.pt", NAN), write(tmp_path / "best.pt")
    status, _, err = ckpt(capsys, "rollback", last, "--to", "best.pt")
    assert status == 2
    assert f"best.pt does not exist in the current folder; did you mean --to {best}?" in err


def test_replacing_a_good_file_by_a_named_one_is_noted(tmp_path, capsys):
    last, best = write(tmp_path / "last.pt"), write(tmp_path / "best.pt", 2.0)
    _, out, _ = ckpt(capsys, "rollback", last, "--to", best)
    assert f"complete and finite too; to undo the rollback, use --to {last}.replaced-1" in out


def test_without_epoch_and_step_the_modification_time_decides(tmp_path, capsys):
    write(tmp_path / "last.pt", NAN)
    write(tmp_path / "a.pt", modified=50)
    write(tmp_path / "b.pt", modified=20)
    _, out, _ = ckpt(capsys, "rollback", tmp_path)
    assert "is now a copy of" in out and "a.pt" in out
    assert "the source contains no epoch or step; it was chosen by its modification time" in out


def test_without_an_epoch_the_step_decides(tmp_path, capsys):
    write(tmp_path / "last.pt", NAN, step=300)
    write(tmp_path / "a.pt", step=100, modified=50)
    write(tmp_path / "b.pt", step=200, modified=20)
    write(tmp_path / "c.pt", step=400, modified=10)
    _, out, _ = ckpt(capsys, "rollback", tmp_path)
    assert "passed over c.pt: is from step 400, later than step 300" in out
    assert "b.pt (step 200)" in out and "chosen by its time" not in out


def test_a_damaged_checkpoint_that_was_set_aside_is_called_damaged(store, capsys):
    with CheckpointStore(store, read_only=True) as opened:
        file = opened.last().file
    os.truncate(store / file, 50)
    status, out, err = ckpt(capsys, "rollback", store)
    assert status == 0
    assert "set aside" in out and f"{file} (step 30, damaged)" in out
    assert "rolled back to" not in err  # not logged a second time


def test_a_problem_in_a_store_names_the_file_once(store, capsys):
    with CheckpointStore(store, read_only=True) as opened:
        path = store / opened.last().file
    os.truncate(path, 50)
    _, out, _ = ckpt(capsys, "verify", store)
    assert out.count(str(path)) == 1


def test_the_error_for_a_store_in_use_is_written_for_the_command_line(store, capsys):
    with CheckpointStore(store):
        status, _, err = ckpt(capsys, "rollback", store)
    assert status == 2
    assert "read_only" not in err
    assert "end that run first. The actions list and verify work while it is running" in err


def test_a_file_of_a_store_is_refused_with_the_command_for_its_store(store, capsys):
    with CheckpointStore(store, read_only=True) as opened:
        path = store / opened.list()[1].file
    status, _, err = ckpt(capsys, "rollback", path)
    assert status == 2
    assert f"is a checkpoint of a store; use: fastguard ckpt rollback {store} --to STEP" in err


def test_one_rebuilt_checkpoint_is_singular(store, caplog):
    (store / "manifest.json").unlink()
    with CheckpointStore(store) as opened:
        for entry in opened.list()[1:]:
            (store / entry.file).unlink()
    (store / "manifest.json").unlink()
    caplog.clear()
    CheckpointStore(store).close()
    assert "rebuilt from 1 checkpoint" in caplog.text
    assert "1 checkpoints" not in caplog.text
