"""The loaded data is the verified data, even if files are replaced or children are forked."""

import os
import shutil
import struct

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastguard import CheckpointStore
from fastguard.checkpoints import (
    DamagedFile,
    StoreLocked,
    archive,
    durable_files,
    roll_back_file,
)
from fastguard.checkpoints.reading import inspect_file
from fastguard.checkpoints.sharded import open_files, shard_report
from guardtest.gloo_groups import group_of_one

NAN = float("nan")


@pytest.fixture
def store(tmp_path):
    """A store with one checkpoint, and another file with the same shapes next to the store."""
    with CheckpointStore(tmp_path / "store") as opened:
        path = tmp_path / "store" / opened.save(m={"w": torch.ones(99)}, step=1).file
        other = torch.load(path, weights_only=True)
        other["data"]["m"]["w"].fill_(666.0)
        torch.save(other, tmp_path / "other.pt")
    return tmp_path / "store"


def test_a_file_replaced_after_hashing_is_not_loaded(store, monkeypatch):
    hashed = archive.sha256_of_open

    def then_swap(file):
        found = hashed(file)
        (path,) = store.glob("*.pt")
        if other.exists():
            os.replace(other, path)
        return found

    other = store.parent / "other.pt"
    monkeypatch.setattr(archive, "sha256_of_open", then_swap)
    with CheckpointStore(store, read_only=True) as opened:
        assert opened.load("last").state["m"]["w"][0] == 1.0
    assert not other.exists()


def test_a_file_written_to_after_hashing_is_an_error(store, monkeypatch):
    hashed = archive.sha256_of_open

    def then_overwrite(file):
        found = hashed(file)
        (path,) = store.glob("*.pt")
        path.write_bytes((store.parent / "other.pt").read_bytes())
        return found

    monkeypatch.setattr(archive, "sha256_of_open", then_overwrite)
    with CheckpointStore(store, read_only=True) as opened:
        with pytest.raises(DamagedFile, match="changed while it was being read"):
            opened.load("last")


@pytest.mark.parametrize("held", [200, 0], ids=["held open", "compared"])
def test_shards_replaced_after_hashing_are_not_loaded(tmp_path, monkeypatch, held):
    monkeypatch.setattr(open_files, "_HELD", held)
    with group_of_one():
        mesh = init_device_mesh("cpu", (1,))
        for name, value in (("good", 1.0), ("other", 666.0)):
            with CheckpointStore(tmp_path / name) as opened:
                w = distribute_tensor(torch.full((8,), value), mesh, [Shard(0)])
                file = opened.save(m={"w": w}, step=1).file
        listed = shard_report.listing

        def then_swap(*arguments):
            found = listed(*arguments)
            shutil.rmtree(tmp_path / "good" / file)
            shutil.copytree(tmp_path / "other" / file, tmp_path / "good" / file)
            return found

        monkeypatch.setattr(shard_report, "listing", then_swap)
        with CheckpointStore(tmp_path / "good", read_only=True) as opened:
            if held:
                assert opened.load("last").state["m"]["w"][0] == 1.0
            else:
                with pytest.raises(DamagedFile, match="changed while it was being read"):
                    opened.load("last")


@pytest.mark.parametrize("held", [200, 0], ids=["held open", "compared"])
@pytest.mark.parametrize("linked", [False, True], ids=["written to", "only linked"])
def test_shards_written_to_after_hashing_are_not_loaded(tmp_path, monkeypatch, held, linked):
    monkeypatch.setattr(open_files, "_HELD", held)
    with group_of_one():
        mesh = init_device_mesh("cpu", (1,))
        with CheckpointStore(tmp_path / "store") as opened:
            w = distribute_tensor(torch.full((8,), 2.0), mesh, [Shard(0)])
            file = opened.save(m={"w": w}, step=1).file
        (path,) = (tmp_path / "store" / file).glob("*.distcp")
        listed = shard_report.listing
        done = []

        def then_change(*arguments):
            found = listed(*arguments)
            if not done and linked:  # as a backup does; this changes nothing in the file
                os.link(path, tmp_path / "backup")
            elif not done:
                overwrite_and_set_the_time_back(path, [2.0] * 8)
            done.append(found)
            return found

        monkeypatch.setattr(shard_report, "listing", then_change)
        with CheckpointStore(tmp_path / "store", read_only=True) as opened:
            if linked:
                assert opened.load().state["m"]["w"].tolist() == [2.0] * 8 and len(done) == 2
            else:
                with pytest.raises(DamagedFile, match="changed on disk"):
                    opened.load()


def test_shards_removed_after_hashing_are_still_loaded(tmp_path, monkeypatch):
    with group_of_one():
        mesh = init_device_mesh("cpu", (1,))
        with CheckpointStore(tmp_path) as opened:
            w = distribute_tensor(torch.full((8,), 2.0), mesh, [Shard(0)])
            file = opened.save(m={"w": w}, step=1).file
        listed = shard_report.listing

        def then_remove(*arguments):
            found = listed(*arguments)
            shutil.rmtree(tmp_path / file, ignore_errors=True)  # as a writer's rotation does
            return found

        monkeypatch.setattr(shard_report, "listing", then_remove)
        with CheckpointStore(tmp_path, read_only=True) as opened:
            assert opened.load().state["m"]["w"].tolist() == [2.0] * 8


def overwrite_and_set_the_time_back(path, values):
    """Replaces the first of these float32 values in a file with NaN."""
    before, raw = path.stat(), path.read_bytes()
    with open(path, "r+b") as written:
        written.seek(raw.index(struct.pack(f"<{len(values)}f", *values)))
        written.write(struct.pack("<f", NAN))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_shards_outside_of_their_folder_are_not_read(tmp_path):
    folder = tmp_path / "step-1.sharded"
    folder.mkdir()
    (tmp_path / "outside").write_text("")
    with open_files.OpenFiles(folder) as opened:
        for name in ("../outside", str(tmp_path / "outside"), "", "."):
            with pytest.raises(DamagedFile, match="outside it"):
                with opened.open(name):
                    pass


def test_a_source_replaced_after_inspection_is_not_copied(tmp_path, monkeypatch):
    for name, value in (("last.pt", NAN), ("good.pt", 1.0), ("other.pt", NAN)):
        torch.save({"w": torch.full((3,), value)}, tmp_path / name)
    before = (tmp_path / "last.pt").read_bytes()
    copy = durable_files.copy_temporary

    def swapped(source, path):
        os.replace(tmp_path / "other.pt", source)
        return copy(source, path)

    monkeypatch.setattr(durable_files, "copy_temporary", swapped)
    with pytest.raises(DamagedFile, match="differs from the verified file"):
        roll_back_file(tmp_path / "last.pt", tmp_path / "good.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_contents_and_data_are_read_from_the_same_file(tmp_path, monkeypatch):
    for name, value in (("a.pt", NAN), ("b.pt", 1.0)):
        torch.save({"w": torch.full((3,), value)}, tmp_path / name)
    contents = inspect_file.contents_of

    def then_swap(*arguments):
        found = contents(*arguments)
        os.replace(tmp_path / "b.pt", tmp_path / "a.pt")
        return found

    monkeypatch.setattr(inspect_file, "contents_of", then_swap)
    assert inspect_file.inspect(tmp_path / "a.pt").bad == (("w", 3, 0, 0),)


def in_a_child(work):
    """Returns the error of `work()` in a forked child, or ""."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with open(reading, "rb") as file:
        return file.read().decode()


@pytest.mark.parametrize("linked", [False, True], ids=["written to", "only linked"])
def test_a_write_whose_time_is_set_back_is_found(tmp_path, monkeypatch, linked):
    with CheckpointStore(tmp_path) as store:
        path = tmp_path / store.save(w=torch.full((9,), 2.0), step=1).file

    def change(file):
        found = hashed(file)
        if not done and linked:  # as a backup does; the contents of the file stay the same
            os.link(path, tmp_path / "backup")
        elif not done:
            overwrite_and_set_the_time_back(path, [2.0] * 9)
        done.append(found)
        return found

    hashed = archive.sha256_of_open
    done = []
    monkeypatch.setattr(archive, "sha256_of_open", change)
    with CheckpointStore(tmp_path, read_only=True) as store:
        if linked:
            assert store.load().state["w"].tolist() == [2.0] * 9 and len(done) == 2
        else:
            with pytest.raises(DamagedFile, match="changed on disk"):
                store.load()


def test_a_forked_child_does_not_save_to_the_store_of_its_parent(tmp_path):
    weights = {"w": torch.ones(3)}
    with CheckpointStore(tmp_path) as store:
        store.save(m=weights, step=1)
        store.save(m=weights, step=2)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        for work in (
            lambda: store.save(m=weights, step=3),
            lambda: store.maybe_save(m=weights, step=3, every=1),
            lambda: store.rollback(1),
        ):
            said = in_a_child(work)
            assert said.startswith(f"StoreLocked: {tmp_path} was opened for writing in process ")
            assert str(os.getpid()) in said
        assert in_a_child(lambda: store.load("last")) == ""  # the child may read
        assert in_a_child(store.verify) == ""
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        store.save(m=weights, step=3)
        assert [entry.step for entry in store.list()] == [1, 2, 3]


def test_a_forked_child_stores_no_verdict(tmp_path):
    with CheckpointStore(tmp_path) as store:
        path = tmp_path / store.save(m={"w": torch.ones(3)}, step=1).file
        before = (tmp_path / "manifest.json").read_bytes()
        path.write_bytes(b"damaged")
        assert in_a_child(store.verify) == ""
        assert in_a_child(lambda: store.load("last-clean")).startswith("CheckpointError")
        assert (tmp_path / "manifest.json").read_bytes() == before


def test_the_error_is_the_same_as_for_a_locked_store(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(StoreLocked):
            store.save(w=torch.ones(1), step=1)
        monkeypatch.undo()
