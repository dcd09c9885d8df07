"""Hostile manifests contain invalid names but a correct checksum."""

import json
import os

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import DamagedFile, manifest
from guardtest.commands import ckpt

DAMAGED = r"manifest\.json is invalid: .*nothing was changed"


def save(store, step):
    return store.save(weights={"w": torch.full((3,), float(step))}, step=step)


@pytest.fixture
def store(tmp_path):
    """A store of two checkpoints, with other files and folders next to them."""
    with CheckpointStore(tmp_path / "store") as opened:
        save(opened, 1)
        save(opened, 2)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("all of it")
    (tmp_path / "notes.txt").write_text("all of it")
    (tmp_path / "store" / "readme.txt").write_text("what this is")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "precious")
    return tmp_path / "store"


def forge(store, **changes):
    """Changes the manifest and updates its checksum."""
    path = store / "manifest.json"
    body = {**json.loads(path.read_text()), **changes}
    body["sha256"] = manifest._digest(body)
    path.write_text(json.dumps(body))


def first(store, **changes):
    """Returns the first entry of the manifest, with changes."""
    return {**json.loads((store / "manifest.json").read_text())["checkpoints"][0], **changes}


def everything(folder):
    return {
        os.path.relpath(os.path.join(at, name), folder): open(os.path.join(at, name), "rb").read()
        for at, _, names in os.walk(folder)
        for name in names
    }


def check_refused(store, capsys):
    """Checks that every way of opening the store reports the reason and changes nothing."""
    before = everything(store.parent)
    for read_only in (False, True):
        with pytest.raises(DamagedFile, match=DAMAGED):
            CheckpointStore(store, read_only=read_only)
    for action in ("list", "verify", "rollback"):
        status, _, err = ckpt(capsys, action, store)
        assert status == 1 and "manifest.json is invalid: " in err
    status, out, _ = ckpt(capsys, "verify", store.parent)  # the store is a subfolder
    assert status == 1 and "manifest.json is invalid" in out
    after = everything(store.parent)
    before.setdefault("store/.lock", None)
    assert {**after, "store/.lock": None} == {**before, "store/.lock": None}


NAMES = [
    "../precious", "../notes.txt", "/etc/hostname", "", ".", "..", "link/thesis.tex", "readme.txt",
    "manifest.json", ".lock", "./step-000000001.000001.pt", "step-000000001.000001.pt/", "a\0b",
    "../step-000000001.000001.pt", "step-000000001.000001.pt/../../notes.txt",
    "step-\u0660.\u0661.pt", "step-1.1.pt\n", "step-1.1.pt.replaced.replaced",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_only_checkpoint_names_are_removed(store, capsys, name):
    forge(store, removing=[name])
    check_refused(store, capsys)


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("key", ["checkpoints", "replaced"])
def test_only_checkpoint_names_are_accepted_in_entries(store, capsys, key, name):
    forge(store, **{key: [first(store, file=name)]})
    check_refused(store, capsys)


def test_an_absolute_path_is_not_a_name(store, capsys):
    forge(store, removing=[str(store.parent / "notes.txt")])
    check_refused(store, capsys)


def test_a_listed_checkpoint_marked_for_removal_is_an_error(store, capsys):
    forge(store, removing=[first(store)["file"]])
    check_refused(store, capsys)


BODIES = {
    "checkpoints": ["x"],
    "checkpoints of none": None,
    "replaced": {"file": "x"},
    "removing": [5],
    "removing is text": "step-000000001.000001.pt",
    "next_serial": float("inf"),
    "next_serial is small": 1,
    "next_serial is text": "7",
    "next_serial is large": 2**63 - 1,
    "mode": "best",
    "mode is a list": [],
    "ignore": [None],
    "ignore is text": "*",
}


@pytest.mark.parametrize("case", BODIES)
def test_a_value_of_another_type_is_damage(store, capsys, case):
    forge(store, **{case.split(" ")[0]: BODIES[case]})
    check_refused(store, capsys)


VALUES = [
    ("file", None), ("file", 5), ("file", ["x"]), ("sha256", None), ("sha256", "x"), ("size", "x"),
    ("size", -1), ("size", 1e999), ("time", 5), ("serial", "x"), ("serial", True),
    ("serial", 2**70), ("serial", 9), ("step", 77), ("step", None), ("step", 1.5), ("epoch", "3"),
    ("metric", 10**400), ("metric", "good"), ("metric", [1]), ("bad", [["a"]]),
    ("bad", [["a", 1, 2, "3"]]), ("bad", 1),
    ("notes", "text"), ("notes", [1]), ("incidents", None), ("skipped_steps", -3),
    ("n_tensors", 1.0), ("verified", 1), ("verified", "yes"), ("tag", 1e999),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), VALUES, ids=str)
def test_a_value_of_another_type_in_an_entry_is_damage(store, capsys, key, value):
    forge(store, checkpoints=[first(store, **{key: value})])
    check_refused(store, capsys)


def test_an_entry_that_lacks_its_file_is_damage(store, capsys):
    entry = first(store)
    del entry["file"]
    forge(store, checkpoints=[entry])
    check_refused(store, capsys)


def test_a_serial_used_twice_is_damage(store, capsys):
    forge(store, checkpoints=[first(store), first(store)])
    check_refused(store, capsys)


@pytest.mark.parametrize(
    "version", [float("inf"), "1", None, 1.5, 1.0, True, False, 0, -1], ids=str
)
def test_a_version_that_is_not_a_number_is_treated_as_damage(store, version):
    forge(store, version=version)
    assert manifest.read(store) is None
    with CheckpointStore(store) as opened:  # rebuilds the manifest
        assert [entry.step for entry in opened.list()] == [1, 2]


def test_entries_written_by_a_store_are_valid(store):
    with CheckpointStore(store, keep=9) as opened:
        opened.save(
            weights={"w": torch.ones(1)},
            step=3,
            metric=float("nan"),
            epoch=0,
            tag={"rows": [1, None, "\ud800", 2.5, True]},
            incidents=["a", "b"],
        )
        opened.save(weights={"w": torch.tensor([float("inf")])}, step=4, metric=float("-inf"))
        opened.rollback()
        opened.rollback(1)
        listed = opened.list(), opened.replaced()
    with CheckpointStore(store, keep=9) as opened:
        assert str(listed) == str((opened.list(), opened.replaced()))
    (store / "manifest.json").unlink()
    with CheckpointStore(store, keep=9) as opened:
        assert [entry.step for entry in opened.list()] == [1]


def nested(n):
    tag = []
    for _ in range(n):
        tag = [tag]
    return tag


@pytest.mark.parametrize("tag", [nested(200), nested(100_000), 10**5000, {1, 2}], ids=type)
def test_a_tag_that_json_cannot_represent_is_an_error_at_save(tmp_path, tag):
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(TypeError, match="cannot be stored in the manifest"):
            store.save(w=torch.ones(1), step=1, tag=tag)
        assert store.list() == ()


@pytest.mark.parametrize("n_bytes", [10, 40 * 2**20], ids=["bytes", "megabytes"])
def test_a_manifest_of_brackets_or_of_huge_size_is_rebuilt(store, n_bytes):
    (store / "manifest.json").write_bytes(b"[" * n_bytes)
    with CheckpointStore(store) as opened:
        assert [entry.step for entry in opened.list()] == [1, 2]
