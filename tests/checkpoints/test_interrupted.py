"""After Ctrl-C or a disk error at any moment of a save, there is a clean checkpoint."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints import manifest


def save(store, step, value=1.0):
    return store.save(weights={"w": torch.full((3,), float(value))}, step=step)


def steps(store):
    return [entry.step for entry in store.list()]


@contextmanager
def stopped_at(k, *, behind, error):
    """Raises `error` before or after the k-th disk operation, and counts the operations."""
    names = ("replace", "fsync", "unlink")
    before = {name: getattr(os, name) for name in names}
    done = []

    def stopping(operation):
        def call(*args, **kwargs):
            done.append(operation)
            if len(done) == k and not behind:
                raise error
            result = operation(*args, **kwargs)
            if len(done) == k:
                raise error
            return result

        return call

    for name, operation in before.items():
        setattr(os, name, stopping(operation))
    try:
        yield done
    finally:
        for name, operation in before.items():
            setattr(os, name, operation)


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=repr)
def test_a_clean_checkpoint_remains_whatever_interrupts_a_save(tmp_path, error, behind):
    for k in range(1, 100):
        folder = tmp_path / str(k)
        with CheckpointStore(folder, keep=1, on_error="raise") as store:
            save(store, 0)
            with stopped_at(k, behind=behind, error=error) as done:
                try:
                    save(store, 1)
                except (KeyboardInterrupt, OSError) as stopped:
                    assert stopped is error
            assert store.load("last-clean").step == store.last().step
            assert all(check.ok for check in store.verify())
            in_use = store.list()
        with CheckpointStore(folder, keep=1) as store:
            assert store.list() == in_use
            assert store.load("last-clean").step in (0, 1)
            assert save(store, 2).clean and steps(store) == [2]
        names = {path.name for path in folder.iterdir()}
        assert names == {".lock", "manifest.json", store.list()[0].file}, k
        if len(done) < k:
            break
    assert k == len(done) + 1 > 6  # the save was stopped at every operation


def test_ctrl_c_while_the_old_checkpoint_is_removed_keeps_the_new_one(tmp_path, monkeypatch):
    def interrupt(_):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    with CheckpointStore(tmp_path, keep=1) as store:
        save(store, 0)
        monkeypatch.setattr(files, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(store, 1)
        signal.signal(signal.SIGINT, before)
        assert steps(store) == [1]
    with CheckpointStore(tmp_path, keep=1) as store:
        assert store.load("last-clean").step == 1


def test_an_unflushed_manifest_is_used_and_reported(tmp_path, monkeypatch, caplog):
    sync = files.sync_folder

    def fail_for_new_manifest(folder):
        known = manifest.read(folder)
        if known is not None and 1 in {entry.step for entry in known.entries}:
            raise OSError(5, "Input/output error")
        sync(folder)

    with CheckpointStore(tmp_path, keep=1) as store:
        save(store, 0)
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync_folder", fail_for_new_manifest)
            assert save(store, 1) is None
        assert steps(store) == [1]
        assert "step 1 was saved, but may be lost in a power failure: [Errno 5]" in caplog.text
        assert "NOT saved" not in caplog.text
    with CheckpointStore(tmp_path, keep=1) as store:
        assert store.load("last-clean").step == 1
        assert save(store, 2).clean and steps(store) == [2]


def test_files_that_a_rollback_cannot_rename_remain_set_aside(tmp_path, monkeypatch, caplog):
    rename = os.replace

    def held(old, new):
        if os.fspath(new).endswith(".replaced"):
            raise OSError(5, "Input/output error")
        rename(old, new)

    with CheckpointStore(tmp_path) as store:
        save(store, 0)
        aside = save(store, 1, float("nan"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", held)
            assert store.rollback().step == 0
            assert save(store, 1).clean  # later saves succeed
        assert f"{aside.file}: [Errno 5]" in caplog.text
        assert steps(store) == [0, 1] and store.replaced() == (aside,)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: held(*a))
        with CheckpointStore(tmp_path) as store:
            assert steps(store) == [0, 1] and store.replaced() == (aside,)
    with CheckpointStore(tmp_path):
        assert (tmp_path / f"{aside.file}.replaced").exists()


def test_an_interrupted_rollback_is_known_to_the_process(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with CheckpointStore(tmp_path) as store:
        save(store, 0)
        save(store, 1, float("nan"))
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync_folder", interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.rollback()
        assert steps(store) == [0]
        assert save(store, 1).clean
        assert all(check.ok for check in store.verify())
