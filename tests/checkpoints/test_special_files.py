"""If a file of a store is a link, pipe or device, nothing is written through it or waits for it.

Each test runs in this process: if something waited for a pipe, the test would never end.
"""

import os

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import CheckpointError, DamagedFile, inspect, roll_back_file
from fastguard.checkpoints import durable_files as files
from guardtest.commands import ckpt

NAN = float("nan")


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "store") as opened:
        opened.save(weights={"w": torch.ones(3)}, step=1)
        opened.save(weights={"w": torch.full((3,), 2.0)}, step=2)
    return tmp_path / "store"


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "victim.txt").write_text("precious")
    return tmp_path / "victim.txt"


def link_to_device(path):
    path.symlink_to("/dev/zero")


SPECIAL = {"pipe": os.mkfifo, "device": link_to_device}


def put(path, kind, victim):
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(victim.parent / "made.txt")
    else:
        SPECIAL[kind](path)


KINDS = ["link", "dangling link", *SPECIAL]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_is_not_a_regular_file_is_an_error(store, victim, capsys, kind):
    put(store / ".lock", kind, victim)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=r"\.lock is a .*, not a regular file; nothing was"):
        CheckpointStore(store)
    status, _, err = ckpt(capsys, "rollback", store)
    assert status == 1 and ".lock is a " in err
    assert victim.read_text() == "precious"
    assert not (victim.parent / "made.txt").exists()
    assert len(os.listdir("/proc/self/fd")) == before
    with CheckpointStore(store, read_only=True) as opened:  # reading needs no lock
        assert opened.load("last").step == 2


def test_a_lock_file_with_several_names_is_locked_but_not_written(store, victim):
    (store / ".lock").unlink()
    os.link(victim, store / ".lock")
    with CheckpointStore(store) as opened:
        opened.save(weights={"w": torch.ones(3)}, step=3)
        assert victim.read_text() == "precious"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "step-000000003.000003.pt"])
def test_a_temporary_name_is_never_written_through(store, victim, name, kind):
    with CheckpointStore(store) as opened:
        put(store / f".tmp-{name}", kind, victim)
        assert opened.save(weights={"w": torch.ones(3)}, step=3) is None  # logged
        assert [e.step for e in opened.list()] == [1, 2]
    assert victim.read_text() == "precious"
    with CheckpointStore(store) as opened:  # removes files that a crash left behind
        assert opened.save(weights={"w": torch.ones(3)}, step=3).clean
    assert victim.read_text() == "precious"
    assert not (victim.parent / "made.txt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollback_of_files_follows_no_link(tmp_path, victim, kind):
    for name, value in (("last.pt", NAN), ("good.pt", 1.0)):
        torch.save({"w": torch.full((3,), value)}, tmp_path / name)
    put(tmp_path / ".tmp-last.pt", kind, victim)
    with pytest.raises(OSError, match="not a regular file"):
        roll_back_file(tmp_path / "last.pt", tmp_path / "good.pt")
    assert victim.read_text() == "precious"
    (tmp_path / ".tmp-last.pt").unlink()
    (tmp_path / ".tmp-last.pt").write_text("what a killed rollback left")
    roll_back_file(tmp_path / "last.pt", tmp_path / "good.pt")
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "good.pt").read_bytes()


def test_a_temporary_file_that_appears_meanwhile_is_not_opened(tmp_path, victim, monkeypatch):
    def racing(path):
        os.symlink(victim, path)
        raise FileNotFoundError

    monkeypatch.setattr(os, "lstat", racing)
    with pytest.raises(FileExistsError):
        files.write_atomically(tmp_path / "x", b"ours")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_manifest_that_is_a_pipe_or_a_device_is_an_error(store, victim, capsys, kind):
    put(store / "manifest.json", kind, victim)
    for read_only in (False, True):
        with pytest.raises(DamagedFile, match=r"manifest\.json is a .*, not a regular file"):
            CheckpointStore(store, read_only=read_only)
    for action in ("list", "verify", "rollback"):
        status, out, err = ckpt(capsys, action, store)
        assert status == 1 and "not a regular file" in out + err, action
    status, out, _ = ckpt(capsys, "verify", store.parent)
    assert status == 1 and "not a regular file" in out


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_not_a_regular_file_is_skipped(store, victim, caplog, kind):
    with CheckpointStore(store, read_only=True) as opened:
        last = opened.last().file
    put(store / last, kind, victim)
    with CheckpointStore(store) as opened:
        with pytest.raises((DamagedFile, OSError)):
            opened.load("last")
        assert [check.ok for check in opened.verify()] == [True, False]
        assert opened.load("last-clean").step == 1
    (store / "manifest.json").unlink()
    with CheckpointStore(store) as opened:
        assert [e.step for e in opened.list()] == [1]
    assert victim.read_text() == "precious"


def test_a_link_in_a_store_is_an_error_even_with_the_same_bytes(store, tmp_path):
    with CheckpointStore(store, read_only=True) as opened:
        last = store / opened.last().file
    last.rename(tmp_path / "elsewhere.pt")
    last.symlink_to(tmp_path / "elsewhere.pt")
    with CheckpointStore(store, read_only=True) as opened:
        with pytest.raises(DamagedFile, match="is a symbolic link, not a regular file"):
            opened.load("last")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["last.pt", "model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_not_a_checkpoint_is_an_error(tmp_path, victim, capsys, name, kind):
    put(tmp_path / name, kind, victim)
    with pytest.raises(OSError, match="not a regular file"):
        inspect(tmp_path / name)
    for action in ("list", "verify"):
        for path in (tmp_path, tmp_path / name):
            status, out, err = ckpt(capsys, action, path)
            assert status == 1 and "not a regular file" in out, (action, path, out, err)
    torch.save({"w": torch.ones(3)}, tmp_path / "good.pt")
    status, _, err = ckpt(capsys, "rollback", tmp_path / name)
    assert status == 2 and "not a regular file" in err


def test_a_link_named_by_the_user_is_followed(tmp_path, capsys):
    torch.save({"w": torch.ones(3)}, tmp_path / "epoch3.pt")
    (tmp_path / "last.pt").symlink_to("epoch3.pt")
    assert inspect(tmp_path / "last.pt").contents.n_tensors == 1
    status, out, _ = ckpt(capsys, "verify", tmp_path / "last.pt")
    assert status == 0 and "1 tensor, all finite" in out
