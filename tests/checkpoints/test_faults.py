"""After real faults of the disk, a run continues and resumes bit for bit.

The full and the read-only disk are small tmpfs, mounted in a user namespace, so that they behave in
the same way for root and for other users.
"""

import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import CheckpointError, DamagedFile
from guardtest import in_ci
from guardtest.longrun import LongRun
from guardtest.programs import run_program
from guardtest.training import assert_same_bits


@pytest.fixture
def saved(tmp_path):
    """A store with checkpoints of steps 3 and 6, and the state of the run at step 10."""
    run = LongRun().advance(3)
    with CheckpointStore(tmp_path / "run") as store:
        run.save(store)
        run.advance(6).save(store)
    return tmp_path / "run", run.advance(10).everything()


def last_file(folder):
    with CheckpointStore(folder, read_only=True) as store:
        return folder / store.last().file


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path):
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo(next(n for n in archive.namelist() if n.endswith("data/0")))
    raw = bytearray(path.read_bytes())
    # A byte of the data, because the header is padded to 64 bytes.
    raw[place.header_offset + 130] ^= 1
    path.write_bytes(raw)


def lose(path):
    path.unlink()


def make_unreadable(path):
    path.unlink()
    path.mkdir()  # reading a folder raises OSError even for root, who ignores permissions


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "is truncated: [0-9]+ of [0-9]+ bytes"),
        (flip_a_byte, "changed on disk after it was written: its SHA-256"),
        (lose, "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(saved, damage, says, caplog):
    folder, expected = saved
    damage(last_file(folder))
    with CheckpointStore(folder) as store:
        with pytest.raises(DamagedFile, match=r'(changed on disk|is missing).*load "last-clean"'):
            store.load("last")
        fine, bad = store.verify()
        assert fine.ok
        assert not bad.ok
        assert re.search(says, bad.problem), bad.problem
        assert store.last_clean().step == 3
        resumed = LongRun.resumed(store, "last-clean")
        assert_same_bits(resumed.advance(10).everything(), expected)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, lose, make_unreadable])
def test_last_clean_works_without_verify(saved, damage, caplog):
    folder, expected = saved
    damage(last_file(folder))
    with CheckpointStore(folder) as store:
        assert_same_bits(LongRun.resumed(store, "last-clean").advance(10).everything(), expected)
        assert "skipping a checkpoint" in caplog.text
        assert store.rollback().step == 3


def test_without_a_manifest_the_checksums_in_the_file_show_a_flipped_byte(saved, caplog):
    folder, expected = saved
    flip_a_byte(last_file(folder))
    (folder / "manifest.json").unlink()
    with CheckpointStore(folder) as store:
        assert [entry.step for entry in store.list()] == [3]
        assert "changed after the file was written" in caplog.text
        assert_same_bits(LongRun.resumed(store).advance(10).everything(), expected)


class Bomb:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


def pickle_bomb(path, size=0):
    """Returns a bomb of at least `size` bytes, so that the file is not reported as truncated."""
    padding = torch.ones(size // 4 + 1)
    header = {"version": 1, "step": 9}
    bomb = Bomb(f"{path}.executed")
    torch.save({"fastguard": header, "objects": bomb, "padding": padding}, path)
    return path


def test_a_pickle_bomb_is_an_error_and_not_executed(saved):
    folder, expected = saved
    planted = folder / "step-000000009.000099.pt"  # named like a file that a crash left behind
    pickle_bomb(planted)
    raw = pickle.dumps(Bomb(folder / "canary"))
    with CheckpointStore(folder) as store:
        assert [entry.step for entry in store.list()] == [3, 6]
        path = pickle_bomb(folder / store.last().file, size=store.last().size)
        (check,) = [c for c in store.verify() if not c.ok]
        assert f"{path}: the file would call posix.mkdir" in check.problem
        with pytest.raises(DamagedFile):
            store.load("last")
        resumed = LongRun.resumed(store)
        assert resumed.step == 3
        assert_same_bits(resumed.advance(10).everything(), expected)
    assert not list(folder.glob("*.executed"))
    pickle.loads(raw)  # Python's own unpickler executes the bomb
    assert (folder / "canary").is_dir()


OPENING = "import sys, fastguard; fastguard.CheckpointStore(sys.argv[1])"


def test_a_rejected_second_process_changes_nothing_for_the_first(saved):
    folder, expected = saved
    with CheckpointStore(folder) as store:
        run = LongRun.resumed(store)
        done = run_program(OPENING, folder)
        assert f"StoreLocked: {folder} is open for writing in process {os.getpid()}" in done.stderr
        run.advance(8).save(store)
    run_program(OPENING, folder, check=True)
    with CheckpointStore(folder) as store:
        resumed = LongRun.resumed(store)
        assert resumed.step == 8
        assert_same_bits(resumed.advance(10).everything(), expected)


def test_a_run_resumes_with_the_release_that_wrote_its_manifest(saved):
    folder, expected = saved
    path = folder / "manifest.json"
    ours = path.read_text()
    path.write_text(ours.replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="version 2, but this release reads up to 1; upgrade"):
        CheckpointStore(folder)
    path.write_text(ours)
    with CheckpointStore(folder) as store:
        assert [entry.step for entry in store.list()] == [3, 6]
        assert_same_bits(LongRun.resumed(store).advance(10).everything(), expected)


def test_a_failed_save_is_logged_and_the_run_continues(saved, caplog, monkeypatch):
    folder, expected = saved
    with CheckpointStore(folder) as store:
        run = LongRun.resumed(store)

        def fail(*_):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            assert run.save(store) is None
            with pytest.raises(TypeError):
                store.save(f=len, step=1)  # misuse is not a disk error
        assert (
            "step 6 was NOT saved: [Errno 5] Input/output error. Training continues" in caplog.text
        )
        assert_same_bits(run.advance(10).everything(), expected)
        assert run.save(store).clean
    assert not list(folder.glob(".tmp-*"))


def small_disk(tmp_path, script, options="size=1m"):
    """Runs a script with a tmpfs at `disk`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs {disk} && exec {sys.executable} -c "$0" {disk}'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        assert not in_ci(), "CI must be able to mount a tmpfs in a user namespace"
        pytest.skip("no user namespaces here, so no small disk can be mounted")
    done = subprocess.run(
        [*command, mount, textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done


def test_full_disk(tmp_path):
    done = small_disk(
        tmp_path,
        """
        import os, sys, logging, torch
        from pathlib import Path
        from fastguard import CheckpointStore
        from guardtest.longrun import LongRun
        from guardtest.training import assert_same_bits

        logging.basicConfig(format="%(message)s")
        disk = Path(sys.argv[1])
        expected = LongRun().advance(10).everything()
        store = CheckpointStore(disk / "run", keep=2)
        run = LongRun().advance(3)
        assert run.save(store).clean
        run.advance(6)
        before = sorted(p.name for p in (disk / "run").iterdir())
        manifest = (disk / "run" / "manifest.json").read_bytes()
        with open(disk / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        assert run.save(store) is None
        assert_same_bits(run.advance(10).everything(), expected)  # the run itself goes on
        full = os.path.getsize(disk / "filler")
        for free in range(100):  # pages: each time the disk fills up at another place
            os.truncate(disk / "filler", full - 4096 * free)
            if run.save(store) is not None:
                break
            assert sorted(p.name for p in (disk / "run").iterdir()) == before
            assert (disk / "run" / "manifest.json").read_bytes() == manifest
            assert all(check.ok for check in store.verify())
            store.close()
            store = CheckpointStore(disk / "run", keep=2)  # it opens on a full disk
        print("failed", free, "times")
        assert 5 < free < 99
        assert [entry.step for entry in store.list()] == [3, 10]
        assert_same_bits(LongRun.resumed(store, 3).advance(10).everything(), expected)
        """,
    )
    assert "step 6 was NOT saved: [Errno 28] No space left on device" in done.stderr


def test_a_directory_that_becomes_read_only_during_the_run(tmp_path):
    done = small_disk(
        tmp_path,
        """
        import subprocess, sys, logging
        from fastguard import CheckpointStore
        from fastguard.checkpoints import CheckpointError
        from guardtest.longrun import LongRun
        from guardtest.training import assert_same_bits

        logging.basicConfig(format="%(message)s")
        folder = sys.argv[1] + "/run"
        expected = LongRun().advance(10).everything()
        store = CheckpointStore(folder)
        run = LongRun().advance(3)
        run.save(store)
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        assert run.advance(6).save(store) is None
        assert_same_bits(run.advance(10).everything(), expected)  # the run itself goes on
        store.close()
        try:
            CheckpointStore(folder)
        except CheckpointError as error:
            print(error)
        with CheckpointStore(folder, read_only=True) as store:
            assert all(check.ok for check in store.verify())
            run = LongRun.resumed(store)
            assert_same_bits(run.advance(10).everything(), expected)
        subprocess.run(["mount", "-o", "remount,bind,rw", folder], check=True)
        with CheckpointStore(folder) as store:
            assert run.save(store).clean
            assert [entry.step for entry in store.list()] == [3, 10]
        """,
        options="size=8m",
    )
    assert "step 6 was NOT saved: [Errno 30] Read-only file system" in done.stderr
    assert "Read-only file system; choose another directory" in done.stdout


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*: File exists"):
        CheckpointStore(tmp_path / "run")
