"""Pickles are read without executing them: bombs raise errors, and classes become placeholders."""

import collections
import importlib
import io
import os
import pathlib
import pickle
import re
import subprocess
import sys
import threading
import types
import warnings

import numpy as np
import pytest
import torch

from fastguard.checkpoints import DamagedFile, UnsafeFile, inspect
from fastguard.checkpoints.reading.contents import read_contents
from fastguard.checkpoints.reading.inert_unpickler import load_inert
from fastguard.checkpoints.reading.inert_values import StandIn
from fastguard.checkpoints.reading.named_leaves import named_leaves

NAN = float("nan")


class Calls:
    """Is pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(folder):
    return os.mkdir, f"{folder}/executed"


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch executed",), "posix.system"),
        (eval, ("1+1",), "builtins.eval"),
        (exec, ("1",), "builtins.exec"),
        (sys.exit, (), "sys.exit"),
        (torch.load, ("x",), "torch.serialization.load"),
        (__import__, ("os",), "builtins.__import__"),
        (open, ("executed", "w"), "_?io.open"),  # "_io.open" since Python 3.13
        (subprocess.Popen, ("true",), "subprocess.Popen"),
        (threading.Thread, (), "threading.Thread"),
        (importlib.import_module, ("os",), "importlib.import_module"),
        (torch.storage._load_from_bytes, (b"x",), "torch.storage._load_from_bytes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_other_calls_are_an_error_with_the_name(
    tmp_path, monkeypatch, function, arguments, name, zipped
):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": [Calls(function, *arguments)]}, "b.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeFile, match=f"would call {name}, which no checkpoint needs"):
        inspect("b.pt")
    assert os.listdir() == ["b.pt"]


def test_a_bare_pickle_bomb_is_an_error(tmp_path):
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Calls(*touch(tmp_path))))
    with pytest.raises(UnsafeFile, match=r"posix\.mkdir"):
        inspect(tmp_path / "b.pt")
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "b.pt").read_bytes())
    assert (tmp_path / "executed").exists()  # Python's own unpickler executes it


ASSEMBLED = {
    # handwritten opcodes of protocols 0 and 2, which no pickler writes
    "INST": b"(S'touch executed'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch executed'\no.",
    "REDUCE of a stand-in": b"cos\nsystem\n(S'touch executed'\ntR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
    "NEWOBJ of an allowed call": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "BUILD on an allowed call": b"\x80\x02ctorch._utils\n_rebuild_parameter\n}U\x01xU\x01ysb.",
    "slots on an allowed call": (
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}U\x0b_Call__workU\x01ys\x86b."
    ),
    "slots on a stand-in class": b"\x80\x02cos\nsystem\nN}U\x08__call__U\x01ys\x86b.",
    "persistent id": b"\x80\x02U\x01xQ.",
}


@pytest.mark.parametrize("raw", ASSEMBLED.values(), ids=ASSEMBLED)
def test_hand_made_pickles_do_nothing(tmp_path, monkeypatch, raw):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.pt").write_bytes(raw)
    with pytest.raises((UnsafeFile, DamagedFile)):
        inspect("b.pt")
    assert os.listdir() == ["b.pt"]


def make_class(module, name, bases=(object,), **body):
    made = type(name, bases, {"__module__": module, **body})
    sys.modules.setdefault(module, types.ModuleType(module))
    setattr(sys.modules[module], name, made)
    return made


@pytest.fixture
def yolo(tmp_path):
    """A file of Ultralytics: pickled modules whose classes do not exist at reading."""
    conv = make_class("vanished_nn", "Conv", (torch.nn.Module,))
    space = make_class("vanished_utils", "IterableNamespace", (types.SimpleNamespace,))
    model = conv()
    model.model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    model.stride = torch.tensor([8.0, 16.0])
    model.args = space(lr0=0.01, path=pathlib.PurePosixPath("a/b"))
    model.again = model.args
    with torch.no_grad():
        model.model[0].weight[1, 0, 2, 2] = NAN
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "last.pt"
    torch.save(
        {
            "epoch": 3,
            "best_fitness": np.float64(0.25),
            "model": None,
            "ema": model.half(),
            "optimizer": optimizer.state_dict(),
            "train_args": {"data": pathlib.PurePosixPath("coco.yaml")},
        },
        path,
    )
    for name in ("vanished_nn", "vanished_utils"):
        sys.modules.pop(name, None)
    return path


def test_a_pickled_module_is_read_without_its_classes(yolo):
    found = inspect(yolo)
    assert found.bad == (("ema.model.0.weight", 1, 0, 0),)
    tree = found.contents.tree
    assert isinstance(tree["ema"], StandIn)
    assert tree["ema"].qualified_name == "vanished_nn.Conv"
    assert (tree["epoch"], tree["best_fitness"]) == (3, 0.25)
    names = {span.name for span in found.contents.spans}
    assert {"ema.model.1.running_mean", "ema.stride"} <= names
    leaves = dict(named_leaves(tree))
    assert leaves["ema.args.lr0"] == 0.01
    assert leaves["train_args.data"] == "coco.yaml"


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_pickled_by_any_python_become_text(module, tmp_path):
    raw = pickle.dumps({"data": pathlib.PurePosixPath("a/b")}, protocol=2)
    named = re.sub(rb"cpathlib(\._local)?\n", f"c{module}\n".encode(), raw)
    assert load_inert(io.BytesIO(named)) == {"data": "a/b"}


@pytest.mark.parametrize("kind", [pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.Path])
def test_the_path_of_the_working_directory_has_no_parts(kind):
    assert load_inert(io.BytesIO(pickle.dumps({"root": kind(".")}, protocol=2))) == {"root": "."}


@pytest.mark.parametrize("arguments", [(), ("text",)], ids=["no argument", "one"])
def test_unknown_classes_become_placeholders_and_unknown_functions_are_an_error(
    tmp_path, arguments
):
    for name in ("Maker", "_Maker", "make"):
        made = make_class("vanished_makers", name)
        torch.save({"x": Calls(made, *arguments)}, tmp_path / f"{name}.pt")
        sys.modules.pop("vanished_makers")
    for name in ("Maker", "_Maker"):
        made = inspect(tmp_path / f"{name}.pt").contents.tree["x"]
        assert made.qualified_name == f"vanished_makers.{name}"
    with pytest.raises(UnsafeFile, match=r"would call vanished_makers\.make, which"):
        inspect(tmp_path / "make.pt")


def test_arrays_of_numbers_are_checked_and_others_are_not(tmp_path):
    value = {
        "big": np.array([1.0, NAN], dtype=">f8"),
        "fortran": np.asfortranarray([[1.0, NAN], [np.inf, 2.0]]),
        "fine": np.array([1.0, 2.0], dtype=">f4"),
        "objects": np.array([NAN, None], dtype=object),
        "times": np.array(["2020-01-01"], dtype="datetime64[s]"),
        "texts": np.array(["a", "b"]),
    }
    torch.save(value, tmp_path / "x.pt")
    assert inspect(tmp_path / "x.pt").bad == (("big", 1, 0, 0), ("fortran", 1, 1, 0))


@pytest.mark.parametrize(("depth", "is_read"), [(20, True), (21, False), (500, False)])
def test_nested_structures_are_read_or_reported_as_unread(tmp_path, depth, is_read):
    kind = np.dtype("f4")
    for _ in range(depth):
        kind = np.dtype([("a", kind)])
    sys.setrecursionlimit(20_000)  # for the pickler
    try:
        torch.save({"x": np.full(3, NAN, dtype="f4").view(kind)}, tmp_path / "x.pt")
    finally:
        sys.setrecursionlimit(1000)
    found = inspect(tmp_path / "x.pt")
    if is_read:
        assert found.bad == (("x", 3, 0, 0),) and found.contents.unread == ()
    else:
        assert found.contents.unread == (("x", "numpy array of dtype structured"),)


def test_a_structure_of_thousands_of_fields_is_reported_as_unread(tmp_path):
    kind = np.dtype([(f"f{i}", "f4") for i in range(1001)])
    torch.save({"x": np.zeros(2, dtype=kind), "w": torch.ones(1)}, tmp_path / "x.pt")
    assert inspect(tmp_path / "x.pt").contents.unread == (("x", "numpy array of dtype structured"),)


def test_a_tensor_is_found_wherever_an_object_may_hold_it(tmp_path):
    slotted = make_class("vanished_slots", "Slotted", __slots__=("w",))
    made = slotted()
    made.w = torch.tensor([NAN])
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.mask = torch.tensor([NAN, NAN])
    value = {"slots": made, "parameter": parameter, "set": {torch.tensor([NAN] * 3)}}
    torch.save(value, tmp_path / "x.pt", pickle_protocol=4)
    sys.modules.pop("vanished_slots")
    found = {name: nan for name, nan, *_ in inspect(tmp_path / "x.pt").bad}
    assert found == {"slots.w": 1, "parameter.mask": 2, "set.0": 3}


def test_the_state_of_a_module_is_read_with_its_versions(tmp_path):
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / "x.pt")
    assert inspect(tmp_path / "x.pt").contents.n_tensors == 5


def test_collections_and_subclasses(tmp_path):
    pair = make_class("vanished_kinds", "Pair", (tuple,))
    table = make_class("vanished_kinds", "Table", (dict,))
    row = make_class("vanished_kinds", "Row", (list,))
    table_value = table(a=torch.tensor([NAN]))
    value = {
        "ordered": collections.OrderedDict(a=1),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, k=[torch.tensor([NAN])]),
        "set": {1, 2},
        "frozen": frozenset([3]),
        "bytes": b"\x00\xff",
        "array": bytearray(b"ab"),
        "complex": 1j,
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "pair": pair((torch.tensor([NAN]), 2)),
        "table": table_value,
        "row": row([torch.tensor([NAN])]),
        "parameter": torch.nn.Parameter(torch.tensor([NAN])),
    }
    torch.save(value, tmp_path / "x.pt")
    sys.modules.pop("vanished_kinds")
    names = [name for name, *_ in inspect(tmp_path / "x.pt").bad]
    assert names == ["default.k.0", "pair.0.0", "table.a", "row.0", "parameter"]
    tree = read_contents(tmp_path / "x.pt").tree
    assert (tree["ordered"], tree["counter"]) == ({"a": 1}, {"a": 2, "b": 1})
    assert (tree["bytes"], tree["size"], tree["dtype"]) == (b"\x00\xff", (2, 3), torch.float16)


def test_cycles_end(tmp_path):
    loop = {"w": torch.tensor([NAN])}
    loop["self"] = loop
    torch.save(loop, tmp_path / "x.pt")
    assert inspect(tmp_path / "x.pt").bad == (("w", 1, 0, 0),)


def test_a_torchscript_archive_is_not_a_checkpoint(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "x.pt")
    with pytest.raises(DamagedFile, match="TorchScript archive is a program"):
        inspect(tmp_path / "x.pt")


def test_items_that_cannot_be_nan_take_no_time_and_other_items_are_bounded(tmp_path, monkeypatch):
    nan = float("nan")
    tree = {"a": [1, 2.5, "x", None, b"y", True, nan, [nan, 1]], "b": (torch.ones(2), 3), "c": 1}
    torch.save(tree, tmp_path / "x.pt")
    found = inspect(tmp_path / "x.pt").contents.tree
    assert [name for name, _ in named_leaves(found)] == ["a.6", "a.7.0", "b.0", "c"]
    monkeypatch.setattr("fastguard.checkpoints.reading.named_leaves._MAX_LEAVES", 10)
    torch.save({"a": [1] * 100, "b": [nan] * 4}, tmp_path / "x.pt")
    inspect(tmp_path / "x.pt")
    torch.save({"a": [nan] * 8}, tmp_path / "x.pt")  # a container counts as three values
    with pytest.raises(DamagedFile, match="more than 10 values, or 3 containers"):
        inspect(tmp_path / "x.pt")
