"""Ambiguous archives: if `verify` reports ok, `torch.load` returns the verified data."""

import io
import struct
import zipfile

import pytest
import torch

from fastguard.checkpoints import DamagedFile, inspect

NAN = float("nan")


def records(value=1.0):
    """Returns the records of a torch checkpoint by name."""
    file = io.BytesIO()
    torch.save({"model": {"w": torch.full((4,), value)}, "epoch": 3}, file)
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path, named, **settings):
    with zipfile.ZipFile(path, "w", **settings) as archive:
        for name, raw in named:
            archive.writestr(name, raw)
    return path


def under(root, found):
    return [(f"{root}/{name}", raw) for name, raw in found.items()]


def loads(path):
    try:
        return torch.load(path, weights_only=True)
    except Exception:
        return None


def test_an_archive_written_by_python_is_read_like_torch_does(tmp_path):
    path = write(tmp_path / "x.pt", under("x", records(NAN)))
    assert loads(path) is not None
    assert inspect(path).bad == (("model.w", 4, 0, 0),)


def test_an_archive_with_two_root_folders(tmp_path):
    path = write(tmp_path / "x.pt", under("a", records(NAN)) + under("b", records(1.0)))
    with pytest.raises(DamagedFile, match="several folders"):
        inspect(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twin", ["data/0", "DATA/0", "Data.pkl", "data.pkl", "Version"])
@pytest.mark.parametrize("first", [False, True], ids=["behind", "before"])
def test_two_records_with_names_equal_except_for_case_are_an_error(tmp_path, twin, first):
    """torch ignores case in names, and Python uses the last record of a name."""
    good, bad = records(1.0), records(NAN)
    more = [(f"x/{twin}", bad.get(twin.lower(), b"3\n"))]
    both = more + under("x", good) if first else under("x", good) + more
    with pytest.raises(DamagedFile, match="same name"):
        inspect(write(tmp_path / "x.pt", both))


def find(raw, signature, n):
    """Returns the start of the n-th header or entry."""
    at = -1
    for _ in range(n + 1):
        at = raw.index(signature, at + 1)
    return at


ENTRY, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
CHANGES = {
    # signature of the changed structure, offset in it, struct format, value
    "name in the directory": (ENTRY, 46 + 2, "<B", ord("D")),
    "name in the header": (LOCAL, 30 + 2, "<B", ord("D")),
    "method in the directory": (ENTRY, 10, "<H", 8),
    "method in the header": (LOCAL, 8, "<H", 8),
    "encrypted in the directory": (ENTRY, 8, "<H", 1),
    "encrypted in the header": (LOCAL, 6, "<H", 1),
    "size in the directory": (ENTRY, 24, "<I", 8),
    "packed size in the directory": (ENTRY, 20, "<I", 8),
    "size in the header": (LOCAL, 22, "<I", 8),
    "checksum in the directory": (ENTRY, 16, "<I", 8),
    "checksum in the header": (LOCAL, 14, "<I", 8),
    "place": (ENTRY, 42, "<I", 1),
    "a folder by its attributes": (ENTRY, 38, "<I", 0x10),
    "disk": (ENTRY, 34, "<H", 1),
    "longer extra field": (LOCAL, 28, "<H", 4),
    "number of records": (END, 10, "<H", 3),
    "number of records here": (END, 8, "<H", 3),
    "place of the directory": (END, 16, "<I", 1),
    "length of the directory": (END, 12, "<I", 1),
    "a comment": (END, 20, "<H", 1),
    "disk of the end": (END, 4, "<H", 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_directory_and_headers_that_disagree(tmp_path, change, n):
    path = write(tmp_path / "x.pt", under("x", records()))
    raw = bytearray(path.read_bytes())
    assert inspect(path).bad == ()
    signature, offset, form, value = CHANGES[change]
    struct.pack_into(form, raw, find(raw, signature, 0 if signature == END else n) + offset, value)
    path.write_bytes(raw)
    with pytest.raises(DamagedFile):
        inspect(path)


@pytest.mark.parametrize("where", ["front", "middle", "end", "comment"])
def test_bytes_outside_records_are_an_error(tmp_path, where):
    path = write(tmp_path / "x.pt", under("x", records()))
    raw = path.read_bytes()
    directory = find(raw, ENTRY, 0)
    if where == "comment":
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = raw[directory:]
    else:
        at = {"front": 0, "middle": directory, "end": len(raw)}[where]
        path.write_bytes(raw[:at] + b"PK\x03\x04".ljust(64, b"\0") + raw[at:])
    with pytest.raises(DamagedFile):
        inspect(path)


def test_one_archive_inside_another(tmp_path):
    """Only some readers find the end record of the inner archive, in a comment of the outer one."""
    inner, outer = tmp_path / "inner.pt", tmp_path / "outer.pt"
    write(inner, under("x", records(NAN)))
    write(outer, [*under("x", records(1.0)), ("x/more", inner.read_bytes())])
    assert inspect(outer).bad == () and loads(outer)["model"]["w"][0] == 1.0
    raw = outer.read_bytes()
    outer.write_bytes(raw + inner.read_bytes())  # the last directory belongs to the inner archive
    with pytest.raises(DamagedFile):
        inspect(outer)


@pytest.mark.parametrize("name", ["x\\data.pkl", "x/data.pkl\0", "x/" + "a" * 600, "x/a\nb", "a"])
def test_names_that_readers_change_are_an_error(tmp_path, name):
    path = write(tmp_path / "x.pt", [*under("x", records()), ("x/" + "q" * (len(name) - 2), b"")])
    raw = path.read_bytes().replace(("x/" + "q" * (len(name) - 2)).encode(), name.encode())
    path.write_bytes(raw)
    with pytest.raises(DamagedFile):
        inspect(path)


def test_a_second_name_in_the_extra_field(tmp_path):
    info = zipfile.ZipInfo("x/other")
    body = struct.pack("<BI", 1, 0) + b"x/data.pkl"
    info.extra = struct.pack("<2H", 0x7075, len(body)) + body
    path = write(tmp_path / "x.pt", [*under("x", records()), (info, b"")])
    with pytest.raises(DamagedFile, match="second name"):
        inspect(path)


@pytest.mark.parametrize("lost", ["version", "data.pkl", "byteorder"])
def test_files_that_torch_cannot_open_are_not_ok(tmp_path, lost):
    found = records()
    del found[lost]
    path = write(tmp_path / "x.pt", under("x", found))
    if loads(path) is None:
        with pytest.raises(DamagedFile):
            inspect(path)
    else:
        assert inspect(path).bad == ()


@pytest.mark.parametrize("version", [b"x", b"", b"99999\n", b"3" * 10_000_000])
def test_an_archive_with_a_version_that_torch_does_not_know(tmp_path, version):
    path = write(tmp_path / "x.pt", under("x", {**records(), "version": version}))
    with pytest.raises(DamagedFile):
        inspect(path)


def test_a_directory_with_a_flipped_bit_is_never_ok_yet_unloadable(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"w": torch.ones(2)}, path)
    raw = path.read_bytes()
    start = find(raw, ENTRY, 0)
    n_ok = 0
    for bit in range(8 * start, 8 * len(raw), 3):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = inspect(path)
        except DamagedFile:
            continue
        if not found.damaged:
            n_ok += 1
            assert torch.equal(torch.load(path, weights_only=True)["w"], torch.ones(2))
    assert n_ok > 100  # bits of times, versions and other unused fields change nothing


def test_a_storage_that_claims_more_elements_than_its_record(tmp_path):
    found = records()
    found["data/0"] = found["data/0"][:8]
    path = write(tmp_path / "x.pt", under("x", found))
    with pytest.raises(DamagedFile, match=r"claims 4 elements of 4 bytes but has 8"):
        inspect(path)


@pytest.mark.parametrize("more", [1, 4, 64])
def test_a_record_longer_than_its_storage_is_damage(tmp_path, more):
    found = records()
    found["data/0"] += bytes(more)
    path = write(tmp_path / "x.pt", under("x", found))
    with pytest.raises(DamagedFile, match=rf"claims 4 elements of 4 bytes but has {16 + more}"):
        inspect(path)


def test_a_tar_archive_that_is_also_a_pickle(tmp_path):
    import tarfile

    path = tmp_path / "x.pt"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(DamagedFile, match="a tar archive"):
        inspect(path)


def test_archives_of_many_records_and_of_64_bit_numbers_are_read(tmp_path):
    torch.save({str(i): torch.full((1,), float(i)) for i in range(3000)}, tmp_path / "x.pt")
    assert inspect(tmp_path / "x.pt").contents.n_tensors == 3000
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        for name, raw in under("y", records(NAN)):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(raw)
    found = loads(tmp_path / "y.pt")
    if found is None:
        with pytest.raises(DamagedFile):
            inspect(tmp_path / "y.pt")
    else:
        assert inspect(tmp_path / "y.pt").bad == (("model.w", 4, 0, 0),)
