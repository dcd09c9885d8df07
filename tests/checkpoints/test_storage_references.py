"""torch resolves references to storages by name: the first use decides what later uses mean.

torch also loads each file, to show the result that `verify` must agree with.
"""

import io
import pickle
import struct
import zipfile

import pytest
import torch

from fastguard.checkpoints import DamagedFile, inspect

NAN = float("nan")


class Storage:
    """Is pickled as a reference to a storage."""

    def __init__(self, key, n, *view, kind=torch.FloatStorage, device="cpu"):
        self.id = ("storage", kind, key, device, n, *view)


class Tensor:
    """Is pickled as a tensor over a storage."""

    def __init__(self, storage, offset, n, *rest):
        self.call = torch._utils._rebuild_tensor_v2, (storage, offset, (n,), (1,), *rest)

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.id if isinstance(obj, Storage) else None


def tensor(storage, offset, n):
    return Tensor(storage, offset, n, False, {})


def pickled(tree):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(tree)
    return file.getvalue()


def archive(path, tree, **records):
    found = {"data.pkl": tree if isinstance(tree, bytes) else pickled(tree), "version": b"3\n"}
    with zipfile.ZipFile(path, "w") as made:
        for name, raw in {**found, **records}.items():
            made.writestr(f"x/{name}", raw)
    return path


def legacy(path, tree, storages, version=1001):
    raw = b"".join(
        pickle.dumps(value, protocol=2)
        for value in (0x1950A86A20F9469CFC6C, version, {"little_endian": True})
    )
    raw += pickled(tree) + pickle.dumps(list(storages), protocol=2)
    for values in storages.values():
        raw += struct.pack(f"<q{len(values)}f", len(values), *values)
    path.write_bytes(raw)
    return path


def loaded(path):
    return torch.load(path, weights_only=True)


def test_a_view_of_a_storage_starts_at_its_offset(tmp_path):
    whole, part = Storage("0", 5, None), Storage("0", 5, ("v", 1, 3))
    first = Storage("0", 5, ("u", 0, 2))
    tree = {"whole": tensor(whole, 3, 2), "part": tensor(part, 0, 3), "first": tensor(first, 0, 1)}
    for values, bad in (([1, 2, 3, 4, 5], ()), ([1, 2, 3, NAN, 5], ("whole", "part"))):
        path = legacy(tmp_path / "x.pt", tree, {"0": values})
        assert loaded(path)["part"].nan_to_num(0).tolist() == [2, 3, 4 if not bad else 0]
        assert {name for name, *_ in inspect(path).bad} == set(bad)
    with pytest.raises(DamagedFile, match="extends past its storage"):
        inspect(legacy(tmp_path / "x.pt", [tensor(part, 1, 3)], {"0": [1] * 5}))


def test_views_of_one_name_have_one_offset(tmp_path):
    """torch uses the first view's offset for both; `b` then contains a NaN."""
    tree = {
        "a": tensor(Storage("0", 5, ("v", 1, 2)), 0, 1),
        "b": tensor(Storage("0", 5, ("v", 3, 2)), 1, 1),
    }
    path = legacy(tmp_path / "x.pt", tree, {"0": [1, 2, NAN, 4, 5]})
    assert loaded(path)["b"].isnan().all()
    with pytest.raises(DamagedFile, match="a part of storage 0 is defined in two ways"):
        inspect(path)


@pytest.mark.parametrize("turned", [False, True], ids=["storage first", "view first"])
def test_a_view_is_not_named_like_a_storage(tmp_path, turned):
    parts = {
        "a": tensor(Storage("1", 2, None), 0, 1),
        "b": tensor(Storage("0", 2, ("1", 0, 2)), 1, 1),
    }
    tree = dict(reversed(parts.items())) if turned else parts
    path = legacy(tmp_path / "x.pt", tree, {"0": [1, 2], "1": [3, NAN]})
    with pytest.raises(DamagedFile, match=r"a part of storage . is defined in two ways"):
        inspect(path)


def twice(first, last):
    """Pickles `{"w": last}` with `first` as an earlier value of the same key."""
    raw = pickled({"w": first, "v": last})
    assert raw.count(b"X\x01\x00\x00\x00v") == 1
    return raw.replace(b"X\x01\x00\x00\x00v", b"X\x01\x00\x00\x00w")


def test_a_use_that_the_file_drops_counts_too(tmp_path):
    """torch reads two floats, one of them NaN; the last use declares one integer."""
    tree = twice(
        tensor(Storage("0", 2), 0, 2), tensor(Storage("0", 1, kind=torch.LongStorage), 0, 1)
    )
    path = archive(tmp_path / "x.pt", tree, **{"data/0": struct.pack("<2f", NAN, 1.0)})
    assert loaded(path)["w"].isnan().any()
    with pytest.raises(DamagedFile, match="storage 0 is used with two types or sizes"):
        inspect(path)


def test_a_dropped_view_counts_too(tmp_path):
    tree = twice(
        tensor(Storage("0", 5, ("v", 1, 2)), 0, 2), tensor(Storage("0", 5, ("v", 3, 2)), 0, 2)
    )
    path = legacy(tmp_path / "x.pt", [], {"0": [1, 2, NAN, 4, 5]})
    path.write_bytes(path.read_bytes().replace(pickled([]), tree, 1))
    assert loaded(path)["w"].isnan().any()
    with pytest.raises(DamagedFile, match="a part of storage 0 is defined in two ways"):
        inspect(path)


VALUES = {"data/0": struct.pack("<4f", 1, 2, 3, 4)}


@pytest.mark.parametrize(
    "rest",
    [(), (False,), (False, {}, None, None), (None, {}), (1, {})],
    ids=["none", "no hooks", "more", "none for a bool", "a number for a bool"],
)
def test_arguments_that_torch_refuses(tmp_path, rest):
    path = archive(tmp_path / "x.pt", [Tensor(Storage("0", 4), 0, 4, *rest)], **VALUES)
    with pytest.raises(Exception, match=r"bool|argument"):
        loaded(path)
    with pytest.raises(DamagedFile):
        inspect(path)


@pytest.mark.parametrize("view", [(None,), (("v", 0, 4),)], ids=["no view", "a view"])
def test_an_archive_has_no_views(tmp_path, view):
    path = archive(tmp_path / "x.pt", [tensor(Storage("0", 4, *view), 0, 4)], **VALUES)
    with pytest.raises(DamagedFile, match="too many values"):
        inspect(path)
    path = legacy(tmp_path / "x.pt", [tensor(Storage("0", 4), 0, 4)], {"0": [1] * 4})
    with pytest.raises(DamagedFile):
        inspect(path)


def test_a_device_that_is_not_text(tmp_path):
    path = archive(tmp_path / "x.pt", [tensor(Storage("0", 4, device=7), 0, 4)], **VALUES)
    with pytest.raises((TypeError, AttributeError)):  # torch 2.8: 'int' has no 'startswith'
        loaded(path)
    with pytest.raises(DamagedFile, match="invalid device"):
        inspect(path)


def test_a_version_that_torch_refuses(tmp_path):
    path = legacy(tmp_path / "x.pt", [tensor(Storage("0", 1, None), 0, 1)], {"0": [1]}, 1002)
    with pytest.raises(RuntimeError, match="Invalid protocol version"):
        loaded(path)
    with pytest.raises(DamagedFile, match="it does not have the version of"):
        inspect(path)


@pytest.mark.parametrize("name", ["BYTEORDER", "Byteorder", "DATA/0", ".Storage_alignment"])
def test_records_that_torch_finds_by_another_case(tmp_path, name):
    tree = [tensor(Storage("1" if "/" in name else "0", 4), 0, 4)]
    records = {"data/1": VALUES["data/0"], **VALUES} if "/" not in name else {}
    more = VALUES["data/0"] if "/" in name else b"8" if name[0] == "." else b"big"
    path = archive(tmp_path / "x.pt", tree, **records, **{name: more})
    with pytest.raises(DamagedFile, match=f"torch reads the record {name} as {name.lower()}"):
        inspect(path)


def test_an_alignment_that_is_not_a_number(tmp_path):
    tree = [tensor(Storage("0", 4), 0, 4)]
    path = archive(tmp_path / "x.pt", tree, **VALUES, **{".storage_alignment": b"x"})
    with pytest.raises(ValueError, match="invalid literal"):
        loaded(path)
    with pytest.raises(DamagedFile, match=r"\.storage_alignment is not a number"):
        inspect(path)


@pytest.mark.parametrize(
    "key", [b"}", b"]", b"c__builtin__\nset\n]\x85R"], ids=["dict", "list", "set"]
)
def test_a_key_that_no_reader_can_use(tmp_path, key):
    path = archive(tmp_path / "x.pt", b"\x80\x02}" + key + b"Ns.")
    with pytest.raises(TypeError, match="unhashable"):
        loaded(path)
    with pytest.raises(DamagedFile, match=r"TypeError: a key that is or contains a list or a dict"):
        inspect(path)
