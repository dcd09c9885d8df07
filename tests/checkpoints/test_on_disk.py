"""The order of a store's disk operations, its lock, and files of other programs."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import (
    CheckpointError,
    DamagedFile,
    StoreLocked,
    manifest,
    roll_back_file,
)
from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints.reading.inspect_file import sha256_of

NAN = float("nan")


def save(store, step, value=1.0, **more):
    return store.save(weights={"w": torch.full((3,), float(value))}, step=step, **more)


def steps(store):
    return [entry.step for entry in store.list()]


def corrupt(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def n_open():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def operations(monkeypatch):
    """Records the disk operations: `("fsync", path)`, `("replace", from, to)`, ..."""
    seen = []

    def spy(name, told):
        operation = getattr(os, name)

        def call(*arguments):
            seen.append((name, *told(*arguments)))
            return operation(*arguments)

        monkeypatch.setattr(os, name, call)

    spy("fsync", lambda handle: (os.readlink(f"/proc/self/fd/{handle}"),))
    for name in ("replace", "link"):
        spy(name, lambda old, new: (os.fspath(old), os.fspath(new)))
    return seen


def check_order(seen):
    """Checks that a file is flushed before its rename, and then its folder."""
    named = [i for i, (kind, *_) in enumerate(seen) if kind in ("replace", "link")]
    for i in named:
        kind, old, new = seen[i]
        if kind == "replace":
            assert ("fsync", old) in seen[:i], f"{old} is not on the disk when it becomes {new}"
        assert seen[i + 1] == ("fsync", os.path.dirname(new)), f"{new} may be lost"
    return len(named)


def test_every_rename_follows_a_flush_and_is_flushed(tmp_path, operations):
    with CheckpointStore(tmp_path / "run") as store:
        save(store, 0)
        assert check_order(operations) == 3  # an empty manifest, the checkpoint, the manifest


def test_a_backup_is_on_disk_before_its_file_is_replaced(tmp_path, operations):
    for name, value in (("last.pt", NAN), ("good.pt", 1.0)):
        torch.save({"w": torch.full((3,), value)}, tmp_path / name)
    roll_back_file(tmp_path / "last.pt", tmp_path / "good.pt")
    assert check_order(operations) == 2
    assert [kind for kind, *_ in operations] == ["fsync", "link", "fsync", "replace", "fsync"]


def test_a_partly_removed_folder_has_a_temporary_name(tmp_path, monkeypatch):
    folder = tmp_path / "step-1.sharded"
    folder.mkdir()
    (folder / "rest.pt").write_text("")

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(OSError):
            files.remove(folder)
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1
    files.remove_temporaries(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_of_several_pieces_is_copied_completely(tmp_path):
    for name, value in (("last.pt", NAN), ("good.pt", 1.0)):
        torch.save({"w": torch.full((1_200_000,), value)}, tmp_path / name)  # 4.8 MB
    roll_back_file(tmp_path / "last.pt", tmp_path / "good.pt")
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "good.pt").read_bytes()


# The lock.


def test_another_name_of_the_folder_is_the_same_folder(tmp_path):
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    with CheckpointStore(tmp_path / "run"):
        with pytest.raises(StoreLocked, match="in this process"):
            CheckpointStore(tmp_path / "alias")


def test_the_lock_names_its_holder_and_is_closed_with_the_store(tmp_path):
    (tmp_path / ".lock").write_text("99999999999999\n")  # the PID of an earlier process
    before = n_open()
    with CheckpointStore(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        assert n_open() == before + 1
    assert n_open() == before


def test_a_store_that_cannot_be_opened_is_not_locked(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match=r"cannot open .* for writing") as full:
            CheckpointStore(tmp_path)
    with CheckpointStore(tmp_path):
        pass
    path = tmp_path / "manifest.json"
    good = path.read_text()
    path.write_text(good.replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="version 2") as kept:
        CheckpointStore(tmp_path)
    path.write_text(good)
    with CheckpointStore(tmp_path):  # although the exceptions keep the frames of the attempts
        assert kept.value and full.value


def test_a_store_that_was_dropped_without_closing_is_not_locked(tmp_path):
    save(CheckpointStore(tmp_path), 0)
    with CheckpointStore(tmp_path) as store:
        assert steps(store) == [0]


def test_a_rollback_reads_its_target_first(tmp_path, caplog):
    with CheckpointStore(tmp_path, keep=9) as store:
        save(store, 0)
        corrupt(tmp_path / save(store, 1).file)
        save(store, 2, NAN)
        with pytest.raises(CheckpointError, match=r"cannot roll back to .*\"last-clean\""):
            store.rollback(to=1)
        assert steps(store) == [0, 1, 2]
        assert store.rollback().step == 0


HOLDING = """
import sys
from fastguard import CheckpointStore
with CheckpointStore(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_rejected_store_leaves_no_open_file(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"open\n"
        before = n_open()
        with pytest.raises(StoreLocked, match=f"in process {process.pid}; wait"):
            CheckpointStore(tmp_path)
        assert n_open() == before
        process.stdin.close()
        assert process.wait(60) == 0
    CheckpointStore(tmp_path).close()


KILLED = """
import os, signal, sys, time
from fastguard import CheckpointStore
store = CheckpointStore(sys.argv[1])
pid = os.fork()  # as a data loader does
if pid == 0:
    time.sleep(60)
    os._exit(0)
print(pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_workers_of_a_killed_run_do_not_hold_its_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        worker = int(process.stdout.readline())
        try:
            assert process.wait(60) == -signal.SIGKILL
            with CheckpointStore(tmp_path) as store:
                save(store, 0)
            os.kill(worker, 0)  # the worker is still running
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_backup_by_the_run_itself_does_not_release_its_lock(tmp_path):
    command = [sys.executable, "-c", HOLDING, tmp_path / "run"]
    with CheckpointStore(tmp_path / "run") as store:
        save(store, 0)
        shutil.copytree(tmp_path / "run", tmp_path / "backup")  # opens and closes .lock too
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert f"StoreLocked: {tmp_path / 'run'} is open for writing in process" in done.stderr
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def test_a_forked_worker_does_not_release_the_lock_when_it_ends(tmp_path):
    def worker(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            except StoreLocked as error:
                os._exit(7 if f"in process {os.getppid()};" in str(error) else 1)
            finally:
                os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    with CheckpointStore(tmp_path) as store:
        assert worker(lambda: CheckpointStore(tmp_path)) == 7
        assert worker(store.close) == 2
        assert worker(lambda: CheckpointStore(tmp_path)) == 7
        assert save(store, 0).clean


# Changes that other programs made to the folder.


def test_verifying_a_read_only_store_writes_nothing(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store, 0)
        path = tmp_path / save(store, 1).file
    corrupt(path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert [check.ok for check in store.verify()] == [True, False]
        with pytest.raises(DamagedFile, match='load "last-clean" instead'):
            store.load("last")
        assert store.load("last-clean").step == 0
        with pytest.raises(CheckpointError, match="read_only"):
            store.rollback()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "manifest.json").write_text("{")
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert steps(store) == [0]
    assert (tmp_path / "manifest.json").read_text() == "{"


def test_damage_is_remembered_even_if_it_cannot_be_stored(tmp_path, monkeypatch, caplog):
    with CheckpointStore(tmp_path) as store:
        save(store, 0)
        corrupt(tmp_path / save(store, 1).file)

        fsync = os.fsync

        def fail(handle):
            if "manifest" in os.readlink(f"/proc/self/fd/{handle}"):
                raise OSError(28, "No space left on device")
            fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            assert [check.ok for check in store.verify()] == [True, False]
            assert save(store, 2) is None
        assert "cannot write the manifest of" in caplog.text
        assert store.last_clean().step == 0


def test_the_next_writer_retries_files_that_could_not_be_removed(tmp_path, monkeypatch, caplog):
    with CheckpointStore(tmp_path, keep=1) as store:
        old = tmp_path / save(store, 0).file
        unlink = Path.unlink

        def held(path, *arguments, **named):
            if path == old:
                raise PermissionError(13, "Permission denied")
            unlink(path, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", held)
            assert save(store, 1).clean
        assert f"cannot remove {old}" in caplog.text
        assert old.exists() and steps(store) == [1]
    with CheckpointStore(tmp_path, keep=1) as store:
        assert not old.exists() and steps(store) == [1]


def test_leftovers_of_a_crash_are_removed_and_a_manifest_of_brackets_is_damage(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store, 0)
    (tmp_path / ".tmp-step-000000001.000002.pt").write_text("half")
    (tmp_path / ".tmp-step-000000001.000003.sharded").mkdir()
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with CheckpointStore(tmp_path) as store:
        assert steps(store) == [0]
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_stored_mode_outlives_the_writer(tmp_path):
    with CheckpointStore(tmp_path, mode="max", keep=9) as store:
        save(store, 0, metric=0.1)
    with CheckpointStore(tmp_path, keep=9) as store:
        save(store, 1, metric=0.9)
        assert store.best().step == 1
    with CheckpointStore(tmp_path, mode="min") as store:
        assert store.best().step == 0


def test_no_serial_is_used_twice_for_any_contents_of_the_folder(tmp_path, caplog):
    with CheckpointStore(tmp_path, keep=1) as store:
        old = tmp_path / save(store, 0).file
        copy = old.read_bytes()
        save(store, 1)
        newest = save(store, 2)
    old.write_bytes(copy)  # restored from a backup
    with CheckpointStore(tmp_path, keep=9) as store:
        assert steps(store) == [0, 2]
        assert save(store, 3).serial == newest.serial + 1
    (tmp_path / "step-000000009.000099.pt").write_text("no checkpoint")
    (tmp_path / "manifest.json").unlink()
    with CheckpointStore(tmp_path, keep=9) as store:
        assert steps(store) == [0, 2, 3]
        assert save(store, 4).serial == 100
    assert caplog.text.count("step-000000009.000099.pt is ignored") == 1


class Bomb:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (f"{self.folder}/executed",)


def test_a_bomb_with_a_valid_checksum_is_not_executed(tmp_path):
    with CheckpointStore(tmp_path) as store:
        path = tmp_path / save(store, 0).file
        torch.save({"objects": {}, "data": {"x": Bomb(tmp_path)}, "rng": {}}, path)
        known = manifest.read(tmp_path)
        forged = replace(known.entries[0], sha256=sha256_of(path), size=path.stat().st_size)
        known.with_entry(forged).write(tmp_path)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(DamagedFile, match="cannot be loaded"):
            store.load("last")
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()  # Python's own unpickler executes it


def test_the_manifest_of_another_tool_is_not_changed(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"name": "a web page"}')
    with pytest.raises(CheckpointError, match=r"manifest\.json is not the manifest of a Ch.*move"):
        CheckpointStore(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
    assert path.read_text() == '{"name": "a web page"}'
    path.unlink()
    with CheckpointStore(tmp_path) as store:
        save(store, 0)
    path.write_text("[]")  # no tool writes this, so the manifest is damaged
    with CheckpointStore(tmp_path) as store:
        assert steps(store) == [0]
