"""The metadata file of a sharded checkpoint is read as data, never as code."""

import os
import pickle
import sys

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints import DamagedFile, UnsafeFile
from fastguard.checkpoints.sharded.metadata import read_metadata
from fastguard.checkpoints.sharded.shard_report import report_on
from fastguard.ranks.lockstep import Peers
from guardtest.sharded_models import build


class Bomb:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (f"{self.folder}/executed",)


def test_metadata_that_points_outside_is_an_error(mesh, tmp_path):
    with CheckpointStore(tmp_path) as store:
        folder = tmp_path / store.save(model=build(mesh)[0], step=0).file
    path, shards = folder / ".metadata", folder / "__0_0.distcp"
    good = path.read_bytes()

    def forge(**changes):
        metadata = pickle.loads(good)
        index, place = next(iter(metadata.storage_data.items()))
        vars(place).update(changes)
        metadata.storage_data = {index: place}
        path.write_bytes(pickle.dumps(metadata))

    forge(relative_path="../elsewhere")
    with pytest.raises(UnsafeFile, match=r"points to \.\./elsewhere, outside its folder"):
        report_on(folder, Peers())
    forge(length=10**6)
    with pytest.raises(DamagedFile, match=r"truncated: .*__0_0\.distcp"):
        report_on(folder, Peers())
    forge(offset=-1)
    with pytest.raises(DamagedFile, match=r"damaged: .*__0_0\.distcp has no shard at byte -1"):
        report_on(folder, Peers())
    torch.save(Bomb(tmp_path), shards)
    forge(offset=0, length=shards.stat().st_size)
    with pytest.raises(UnsafeFile, match=r"__0_0\.distcp: the file would call posix\.mkdir"):
        report_on(folder, Peers())
    assert not (tmp_path / "executed").exists()
    torch.load(shards, weights_only=False)
    assert (tmp_path / "executed").exists()  # Python's own unpickler executes it


def test_shards_do_not_overlap(mesh, tmp_path):
    """If the metadata names a position a thousand times, it must not be read a thousand times."""
    with CheckpointStore(tmp_path) as store:
        folder = tmp_path / store.save(model=build(mesh)[0], step=0).file
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    first, *others = metadata.storage_data.values()
    for place in others:
        vars(place).update(vars(first))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedFile, match=r"has shards that overlap at byte"):
        report_on(folder, Peers())


def test_metadata_with_a_call_is_an_error(tmp_path):
    class Bomb:
        def __reduce__(self):
            return print, ("executed",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UnsafeFile, match=r"would call builtins\.print"):
        read_metadata(tmp_path)


METADATA = "torch.distributed.checkpoint.metadata"


@pytest.mark.parametrize(
    "target",
    [
        (METADATA, "Metadata"),
        (METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.serialization", "_get_layout"),
    ],
    ids=["class", "enum", "function"],
)
def test_metadata_changes_no_class_of_this_process(tmp_path, target):
    module, name = target
    slots = b"U\x0c__setstate__ctorch.serialization\n_get_layout\n"
    raw = f"c{module}\n{name}\n".encode() + b"N}(" + slots + b"u\x86b."
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + raw)
    with pytest.raises(UnsafeFile, match=r"tries to change .*; nothing was executed"):
        read_metadata(tmp_path)
    assert "__setstate__" not in vars(getattr(sys.modules[module], name))


def forged(folder, change):
    """Rewrites the metadata of a folder after `change` has modified it."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def set_first(mapping, **values):
    vars(next(iter(mapping.values()))).update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: vars(m).update(state_dict_metadata=[]),
        lambda m: vars(m).update(storage_data=None),
        lambda m: vars(m).update(version=5),
        lambda m: vars(m).update(storage_meta="x"),
        lambda m: vars(m).update(planner_data={"a": 5}),
        lambda m: m.state_dict_metadata.update({5: 5}),
        lambda m: m.state_dict_metadata.update(a=torch.float32),
        lambda m: set_first(m.state_dict_metadata, size="big"),
        lambda m: set_first(m.state_dict_metadata, chunks=[3]),
        lambda m: set_first(m.state_dict_metadata, size=torch.Size([2]), properties=None),
        lambda m: set_first(m.storage_data, offset="0"),
        lambda m: set_first(m.storage_data, length=True),
        lambda m: set_first(m.storage_data, relative_path=b"x"),
        lambda m: m.storage_data.update({"a": 1}),
    ],
    ids=range(14),
)
def test_metadata_of_values_of_another_type_is_damage(mesh, tmp_path, change):
    with CheckpointStore(tmp_path) as store:
        folder = tmp_path / store.save(model=build(mesh)[0], step=0).file
    read_metadata(folder)
    forged(folder, change)
    with pytest.raises(DamagedFile, match=r"\.metadata"):
        read_metadata(folder)
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert not store.verify()[0].ok


def test_metadata_of_deeply_nested_tuples_is_read_quickly(tmp_path):
    tower = b"\x80\x02X\x01\x00\x00\x00aq\x00" + b"".join(
        b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)
    )
    for end in (b"0}h\x3cNs.", b"0cpathlib\nPosixPath\nh\x3cR.", b"r\xff\xff\xff\x7f."):
        (tmp_path / ".metadata").write_bytes(tower + end)
        with pytest.raises(DamagedFile):
            read_metadata(tmp_path)


def test_members_of_an_enum_are_read_by_value_and_by_name(mesh, tmp_path, monkeypatch):
    """Python 3.11.0 to 3.11.3 pickle enum members as `getattr(kind, name)`."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    def as_attribute(self, _):
        return getattr, (_MEM_FORMAT_ENCODING, self.name)

    with CheckpointStore(tmp_path) as store:
        folder = tmp_path / store.save(model=build(mesh)[0], step=0).file
    for by_name in (False, True):
        if by_name:
            monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", as_attribute)

        def channels_last(metadata):
            for tensor in metadata.state_dict_metadata.values():
                tensor.properties.memory_format = torch.channels_last

        forged(folder, channels_last)
        raw = (folder / ".metadata").read_bytes()
        assert (b"getattr" in raw) == by_name
        found = read_metadata(folder).state_dict_metadata.values()
        assert {t.properties.memory_format for t in found} == {torch.channels_last}


def test_rebuilt_metadata_equals_the_written_one(mesh, tmp_path):
    with CheckpointStore(tmp_path) as store:
        folder = tmp_path / store.save(model=build(mesh)[0], step=0).file
    ours, theirs = read_metadata(folder), pickle.loads((folder / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_meta.save_id == theirs.storage_meta.save_id
