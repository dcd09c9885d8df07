"""The manifest of a store: what it lists, and how it is rebuilt."""

import json
import subprocess

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import CheckpointError
from guardtest.longrun import LongRun

NAN = float("nan")


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "run", keep=2, on_error="raise") as opened:
        yield opened


def save(store, step, value=1.0, **more):
    return store.save(weights={"w": torch.full((3,), float(value))}, step=step, **more)


def test_the_manifest_lists_the_saved_checkpoints(store):
    first = save(store, 3, epoch=1, metric=0.25, tag=["warm-up", 7], incidents=2)
    assert (first.step, first.epoch, first.metric, first.tag) == (3, 1, 0.25, ["warm-up", 7])
    assert (first.incidents, first.n_tensors, first.clean, first.verified) == (2, 1, True, True)
    assert first.size == (store.directory / first.file).stat().st_size
    done = subprocess.run(
        ["sha256sum", store.directory / first.file], capture_output=True, text=True
    )
    assert done.stdout.split()[0] == first.sha256
    raw = json.loads((store.directory / "manifest.json").read_text())
    assert raw["version"] == 1
    assert raw["checkpoints"][0]["sha256"] == first.sha256


def test_incident_records_become_notes_in_the_manifest(store):
    run = LongRun().advance(5)
    entry = store.save(run.objects(), step=5, incidents=run.optimizer.records())
    assert entry.incidents == 1
    assert "nonfinite" in entry.notes[0]


def test_a_lost_manifest_is_rebuilt_from_the_files(tmp_path, caplog):
    with CheckpointStore(tmp_path, keep=5) as store:
        save(store, 0, epoch=0, metric=0.5, tag="start")
        save(store, 1, NAN, incidents=4)
        before = store.list()
    (tmp_path / "manifest.json").unlink()
    with CheckpointStore(tmp_path, read_only=True) as looked:
        assert looked.list() == before
    assert not (tmp_path / "manifest.json").exists()
    with CheckpointStore(tmp_path, keep=5) as store:
        assert store.list() == before
        assert save(store, 2).serial == 3
    assert "lost or damaged; rebuilt from 2 checkpoints" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{", b'["format", 3]', None], ids=range(4))
def test_a_damaged_manifest_is_rebuilt(tmp_path, damage):
    with CheckpointStore(tmp_path) as store:
        save(store, 5)
        before = store.list()
    path = tmp_path / "manifest.json"
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"step": 5', b'"step": 6') if damage is None else damage)
    with CheckpointStore(tmp_path) as store:
        assert store.list() == before
    assert (tmp_path / "manifest.json.damaged").exists()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_manifest_of_a_newer_version_is_an_error_and_is_not_changed(tmp_path, read_only):
    with CheckpointStore(tmp_path) as store:
        save(store, 5)
    path = tmp_path / "manifest.json"
    newer = path.read_text().replace('"version": 1', '"version": 2')
    path.write_text(newer)
    with pytest.raises(CheckpointError, match="version 2, but this release reads up to 1; upgrade"):
        CheckpointStore(tmp_path, read_only=read_only)
    assert path.read_text() == newer
    path.write_text(newer.replace('"version": 2', '"version": 1'))
    with CheckpointStore(tmp_path) as store:
        assert store.load().step == 5
