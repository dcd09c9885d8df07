"""Small files that are made to take gigabytes or minutes are refused with the reason.

One process verifies all files. It may take 2 GB more than after its imports, and 10 seconds of CPU
time per file. The work is proportional to the budgets, so most pickles are tested with one eighth
of the budgets, memory and time.
"""

import io
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch

from fastguard.checkpoints import DamagedFile, inspect
from fastguard.checkpoints.reading import bounded_reader, named_leaves
from guardtest.limited import verified

START, END = b"\x80\x02", b"."


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def doubled(make, n):
    """Applies x -> make(x, x) n times: about 20 bytes each double the size of the value."""
    made = START + text(b"a" * 8) + b"q\x00"
    for i in range(n):
        made += make(b"h" + bytes([i])) + b"q" + bytes([i + 1])
    return made


def pair(x):
    return x + x + b"\x86"


def call(function):
    return lambda x: b"c" + function + b"\n" + x + x + b"\x86R"


def storage(n, key=b"0"):
    """Pushes a storage of n float32."""
    parts = text(b"storage") + b"ctorch\nFloatStorage\n" + text(key) + text(b"cpu")
    return b"(" + parts + b"J" + struct.pack("<i", n) + b"tQ"


def integer(value):
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little")
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(offset, size, stride, left=b"h\x00"):
    """Pushes a view of the storage in the memo."""
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return function + b"(" + left + integer(offset) + numbers(size) + numbers(stride) + b"\x89}tR"


def views(shapes):
    made = START + storage(1000) + b"q\x000}("
    for i, (size, stride) in enumerate(shapes):
        made += text(str(i).encode()) + tensor(0, size, stride)
    return made + b"u" + END


def deep(n):
    return START + b"]" * n + b"a" * (n - 1) + END


def long_names():
    """Twenty nested dicts with keys of 200 characters, around a long list."""
    name = text(b"n" * 200)
    made = START + b"}" + (name + b"}") * 20 + name
    return made + b"](" + b"N" * 400_000 + b"e" + b"s" * 21 + END


def colliding_keys():
    """Integers that all have the same hash."""
    keys = b"".join(integer((2**61 - 1) * i) + b"N" for i in range(1, 60_000))
    return START + b"}(" + keys + b"u" + END


def copies(function, n=20_000):
    """A tuple of a million elements, passed repeatedly to a function that copies it."""
    big = b"(" + b"N" * 1_000_000 + b"tq\x00"
    return START + big + b"0](" + (b"c" + function + b"\nh\x00\x85R") * n + b"e" + END


def tower_of_numbers(width=10, height=10):
    """Nests lists of the same list: `width**height` numbers, with the memo index `height`."""
    made = b"](" + (b"G" + struct.pack(">d", 1.0)) * width + b"eq\x010"
    for i in range(1, height):
        made += b"](" + b"h%c" % i * width + b"eq%c0" % (i + 1)
    return made


def array_of_a_tower(function, arguments):
    return START + tower_of_numbers() + b"carray\n" + function + b"\n(" + arguments + b"tR" + END


def arrays_of_the_same_bytes(n):
    """Numpy arrays that share ten million bytes of text."""
    data = "\x00\x00\x80\x7f" * 2_500_000
    encoded = b"c_codecs\nencode\n" + text(data.encode()) + text(b"latin1") + b"\x86Rq\x00"
    kind = b"cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R(K\x03" + text(b"<") + b"NNN"
    kind += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbq\x01"
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + integer(2_500_000)
    array += b"\x85h\x01\x89h\x00tb"
    return START + encoded + b"0" + kind + b"0](" + array * n + b"e" + END


PICKLES = {
    "a list that contains itself": b"\x80\x02]q\0" + b"h\0a" * 4_000_000 + b".",
    "a device of itself twice": doubled(call(b"torch\ndevice"), 34) + END,
    "a path of itself twice": doubled(call(b"pathlib\nPosixPath"), 34) + END,
    "a device of a tower": doubled(pair, 34) + b"0ctorch\ndevice\nh\x22\x85R" + END,
    "a storage of a tower": doubled(pair, 34) + b"0h\x22Q" + END,
    "a call of a tower": doubled(pair, 34) + b"0h\x22)R" + END,
    "a call of a tower of partials": START + b"cfunctools\npartial\nq\x00cposix\nsystem\n\x85Rq\x01"
    + b"".join(
        b"h\x00h%c\x85R(h%cNNNtbq%c" % (i, i, i + 1) for i in range(1, 60)
    ) + b"h\x3c)R" + END,
    "a state for a tower": doubled(pair, 34) + b"0cos\nsystem\nh\x22b" + END,
    "a hundred thousand lists in one another": deep(100_000),
    "ten thousand lists": deep(10_000),
    "long names": long_names(),
    "a size copied again and again": copies(b"torch\nSize"),
    "a set copied again and again": copies(b"__builtin__\nset"),
    "a deque copied again and again": copies(b"collections\ndeque"),
    "twenty million opcodes": START + b"(" + b"N" * 20_000_000 + b"t" + END,
    "ten million dicts": START + b"(" + b"}" * 10_000_000 + b"t" + END,
    "an integer of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "a long of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "a line without end": b"V" + b"a" * 3_000_000,
    "text of four gigabytes": START + b"X\xff\xff\xff\xff" + END,
    "bytes larger than any memory": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + END,
    "a long of two gigabytes": START + b"\x8b\xff\xff\xff\x7f" + END,
    "a hundred thousand dimensions": START + storage(1000) + b"q\x000"
    + tensor(0, [1] * 100_000, [1] * 100_000) + END,
    "a size larger than any memory": views([([2**62, 2**62], [0, 0])]),
    "a stride larger than any memory": views([([2, 2], [2**62, 1])]),
    "lists and lists": START + b"(" + b"]" * 400_000 + b"t" + END,
    "a dict of millions": START + b"}(" + b"".join(
        b"M" + struct.pack("<H", n % 60_000) + b"\x85N" for n in range(400_000)
    ) + b"u" + END,
    "names and names": START + b"(" + b"".join(
        b"cm\nA%d\n0" % n for n in range(150_000)
    ) + b"t" + END,
    "calls of a partial": START + b"cfunctools\npartial\nq\x00h\x00\x85Rq\x010("
    + b"h\x01)R" * 20_000 + b"t" + END,
    "a map of a million functions": START + b"(ca\nB\nq\x010" + b"h\x01" * 200_000
    + b"tq\x020(" + b"c__builtin__\nmap\nh\x02R" * 200 + b"t" + END,
    "a storage larger than its record": START + storage(2**31 - 1) + b"q\x000"
    + tensor(0, [1], [1]) + END,
    "views over the same bytes": views(
        [([1000 - i % 999, 1 + i // 999], [1, 0]) for i in range(20_000)]
    ),
    "windows that overlap": views(
        [([500, 500], [1, 1])] + [([400, 400 + i % 200], [1, 1]) for i in range(200)] * 40
    ),
    "an array of a tower": array_of_a_tower(b"array", text(b"d") + b"h\x0a"),
    "an array of a tower, reconstructed": array_of_a_tower(
        b"_array_reconstructor", b"NNK\x0eh\x0a"
    ),
    "one element a million million times": views([([10**6, 10**6, 10**6], [0, 0, 0])]),
}  # fmt: skip

HARMLESS = {  # must be read like ordinary files
    "memo index of 2 to the 28": START + b"Nr" + struct.pack("<I", 2**28 - 1) + END,
    "memo index of text": b"Np4000000000\n.",
    "a key that is a tower": doubled(pair, 40) + b"0}h\x28Ns" + END,
    "keys that collide": colliding_keys(),
    "arrays of the same bytes": arrays_of_the_same_bytes(30),
    "an array a million times": arrays_of_the_same_bytes(1)[: -len(b"e" + END)]
    + b"q\x02" + b"h\x02" * 200_000 + b"e" + END,
    "a tensor a million times": START + storage(1000) + b"q\x00" + tensor(0, [1], [1])
    + b"q\x01](" + b"h\x01" * 200_000 + b"e" + END,
    "NaN under long names": START + (b"}" + text(b"n" * 200)) * 4 + b"]("
    + (b"G" + struct.pack(">d", float("nan"))) * 100_000 + b"essss" + END,
}  # fmt: skip


def archive(path, pickled):
    """Writes a valid archive of 1000 float32, the first of which is Inf."""
    with zipfile.ZipFile(path, "w") as made:
        data = struct.pack("<1000f", float("inf"), *[1.0] * 999)
        named = {"data.pkl": pickled, "data/0": data, "version": b"3\n", "byteorder": b"little"}
        for name, raw in named.items():
            made.writestr(f"x/{name}", raw)
    return path


def legacy(path, pickled):
    head = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {}):
        pickle.dump(value, head, protocol=2)
    path.write_bytes(head.getvalue() + pickled + pickle.dumps([], protocol=2))
    return path


ENTRY = b'{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}'
HEADERS = {
    "a hundred thousand dimensions": b'{"a":' + ENTRY % b",".join([b"1"] * 100_000) + b"}",
    "a million names for one place": b"{"
    + b",".join(b'"%d":%s' % (i, ENTRY % b"1") for i in range(500_000))
    + b"}",
    "brackets": b"[" * 50_000_000,
    "empty lists": b"[" + b"[]," * 30_000_000 + b"[]]",
    "objects": b'{"a":' * 10_000_000,
    "a long number": b'{"a":' + b"9" * 1_000_000 + b"}",
    "spaces": b"{" + b" " * 90_000_000,
}
WHOLE = ["twenty million opcodes", "views over the same bytes"]  # the slowest file for each budget


def over(path):
    """Divides the budgets and the limits."""
    return 1 if path.stem in WHOLE or path.suffix == ".safetensors" else 8


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns the result of `verify` for each file, from one process to save imports."""
    folder = tmp_path_factory.mktemp("bombs")
    paths = [archive(folder / f"{name}.pt", raw) for name, raw in {**PICKLES, **HARMLESS}.items()]
    paths += [legacy(folder / f"{name}.old.pt", PICKLES[name]) for name in list(PICKLES)[:6]]
    for name, header in HEADERS.items():
        paths.append(folder / f"{name}.safetensors")
        paths[-1].write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    yield verified(paths, tmp_path_factory.mktemp("warm"), over=over)
    shutil.rmtree(folder)


def test_pickles_and_shapes(found):
    pickles = {name: one for name, one in found.items() if name.endswith(".pt")}
    assert len(pickles) == len(PICKLES) + len(HARMLESS) + 6
    for name, one in pickles.items():
        if name.removesuffix(".pt") in HARMLESS:
            assert one["status"] in (0, 1), one
        else:
            assert one["status"] == 1 and one["said"].startswith(f"BAD  {one['path']}: "), one
        assert not one["events"], one


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(found, name):
    one = found[f"{name}.safetensors"]
    assert one["status"] == 1 and one["said"].startswith(f"BAD  {one['path']}: "), one


def test_the_budget_causes_the_error(tmp_path, monkeypatch):
    """The budget is enough for 100,000 tensors."""
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(50)])
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict()}, tmp_path / "x.pt")
    monkeypatch.setattr(bounded_reader, "BUDGET", bounded_reader.BUDGET // 250)
    assert inspect(tmp_path / "x.pt").contents.n_tensors == 400
    monkeypatch.setattr(bounded_reader, "BUDGET", 10_000)
    with pytest.raises(DamagedFile, match=r"designed to be slow or huge: after [\d,]+ steps"):
        inspect(tmp_path / "x.pt")


def test_containers_that_repeat_are_counted(monkeypatch):
    monkeypatch.setattr(named_leaves, "_MAX_LEAVES", 1000)
    tree = [[]] * 400
    assert not list(named_leaves.named_leaves(tree))
    with pytest.raises(DamagedFile, match="too many for a checkpoint"):
        list(named_leaves.named_leaves(tree * 2))


@pytest.mark.parametrize("kept", [1000, 10_000], ids=["none is kept", "the first is kept"])
def test_large_arrays_in_a_pickle_are_checked_without_copying(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(bounded_reader, "SHORT", 1000)
    monkeypatch.setattr(bounded_reader, "LONG", kept)
    monkeypatch.setattr(bounded_reader, "KEPT", kept)
    values = np.ones((300, 7), dtype=np.float32)
    values[299, 6], values[0, 0], values[150, 3] = np.nan, np.inf, -np.inf
    for protocol in (2, 4, 5):
        torch.save(
            {"a": values, "b": values.astype(">f8").T}, tmp_path / "x.pt", pickle_protocol=protocol
        )
        assert inspect(tmp_path / "x.pt").bad == (("a", 1, 1, 1), ("b", 1, 1, 1)), protocol
