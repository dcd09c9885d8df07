"""Checkpoints contain settings, enums and methods. These are never imported, and few are refused.

Each refused pickle is first run by Python's own unpickler, to show that it is dangerous.
"""

import argparse
import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import http
import itertools
import logging
import operator
import os
import pathlib
import pickle
import random
import re
import signal
import sys
import types
import typing
import uuid
import zoneinfo

import numpy as np
import pytest
import torch

from fastguard.checkpoints import UnsafeFile, inspect
from fastguard.checkpoints.reading.weights_only import refused_names
from guardtest.commands import ckpt

NAN = float("nan")
HERE = "settings_of_a_user"


def of_user(thing):
    """As if defined in a module that does not exist when the file is read."""
    module = sys.modules.setdefault(HERE, types.ModuleType(HERE))
    thing.__module__ = HERE
    setattr(module, thing.__name__, thing)
    return thing


@of_user
class Color(enum.Enum):
    RED, BLUE = 1, "blue"


@of_user
class Access(enum.IntFlag):
    READ, WRITE = 1, 2


@of_user
class stage(enum.IntEnum):
    WARMUP = 3


@of_user
@dataclasses.dataclass
class Settings:
    color: Color = Color.RED
    patience: datetime.timedelta = datetime.timedelta(minutes=5)
    masks: typing.Any = dataclasses.field(default_factory=lambda: torch.tensor([NAN]))


@of_user
class Layer(torch.nn.Linear):
    class Mode(enum.Enum):
        FUSED = 1

    def __init__(self):
        super().__init__(2, 2)
        self.forward = self.forward_fused  # as in a fused YOLO
        self.mode = self.Mode.FUSED

    def forward_fused(self, x):
        return x


@of_user
class Record:
    def __reduce__(self):
        return Record.from_numbers, ((1, 2),)

    @classmethod
    def from_numbers(cls, numbers):
        return cls()


@of_user
class WithKeywords:
    def __new__(cls, *, size=1):
        return object.__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"size": 2}


@of_user
def warm_up(step, n=3):
    return step / n


VALUES = {
    "enum": [Color.RED, Color.BLUE, {Color.RED: 1}, Access.READ | Access.WRITE, stage.WARMUP],
    "enums of Python": [signal.SIGTERM, http.HTTPStatus.OK, re.I],
    "partial": functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99)),
    "partial of a function": functools.partial(functools.partial(warm_up, n=5), 2),
    "schedule": collections.defaultdict(functools.partial(collections.defaultdict, int)),
    "dates": [
        datetime.timedelta(1, 2, 3),
        datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        datetime.datetime(2020, 1, 2, tzinfo=zoneinfo.ZoneInfo("UTC")),
        {datetime.date(2020, 1, 2): datetime.time(3)},
    ],
    "containers": [
        collections.deque([1, torch.ones(2)], maxlen=3),
        collections.ChainMap({"a": 1}),
        collections.UserDict(a=1),
        {frozenset([1, 2]): range(3), (1, Color.RED): slice(1, 2)},
        types.SimpleNamespace(a=1),
        argparse.Namespace(color=Color.RED, dtype=torch.bfloat16),
    ],
    "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3), uuid.UUID(int=3), 1 + 2j],
    "regex": re.compile("layer.(0|1)", re.I),
    "methods": [torch.Tensor.add, Layer.forward_fused, [].append, ",".join, Record.from_numbers],
    "functions": [torch.relu, torch.nn.functional.gelu, torch.nn.functional.silu, np.sin, warm_up],
    "module": torch.nn.TransformerEncoderLayer(4, 2, 8, activation=torch.nn.functional.gelu),
    "fused module": Layer(),
    "alternative constructor": Record(),
    "keywords": WithKeywords(size=4),
    "types": [
        list, dict[str, int], int | None, typing.Any, typing.Literal["a"],
        type(None), torch.float16, np.dtype("float32"), np.float32, Settings,
    ],
    "errors": [ValueError("x"), FileNotFoundError(2, "no")],
    "iterators": [
        iter([1]), zip([1], [2], strict=True), map(int, ["1"]), enumerate("a"),
        # Since Python 3.14 the iterators of itertools cannot be pickled.
        *([itertools.count(3)] if "__reduce__" in vars(itertools.count) else []),
    ],
    "callables": [operator.itemgetter(1), operator.methodcaller("x"), operator.attrgetter("a.b")],
    "random": [random.Random(3), np.random.default_rng(3), np.random.RandomState(3)],
    "logger": logging.getLogger("x"),
    "path": pathlib.Path("a/b"),
    "schedulers": torch.optim.lr_scheduler.LambdaLR(
        torch.optim.SGD([torch.ones(1)], lr=0.1), functools.partial(warm_up, n=2)
    ),
    "distribution": torch.distributions.Normal(torch.zeros(2), torch.ones(2)),
    "layouts": [torch.strided, torch.per_tensor_affine, torch.Size([1]), torch.device("cuda:1")],
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_file_with_values_of_any_type_is_read(tmp_path, monkeypatch, value, protocol, zipped):
    path = tmp_path / "x.pt"
    tree = {"value": value, "w": torch.tensor([1.0, NAN])}
    torch.save(tree, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, HERE)
    assert inspect(path).bad == (("w", 1, 0, 0),)


def test_tensors_in_values_are_found(tmp_path):
    parameter = torch.nn.Parameter(torch.tensor([NAN]))
    tree = {
        "settings": Settings(),
        "partial": functools.partial(warm_up, torch.tensor([NAN])),
        "deque": collections.deque([torch.tensor([NAN])]),
        "bound": Layer().forward_fused.__self__,
        "state": {parameter: 1},
        "storage": torch.tensor([1.0, NAN]).storage(),
    }
    tree["bound"].weight.data[0, 0] = NAN
    torch.save(tree, tmp_path / "x.pt")
    names = {name.partition(".")[0] for name, *_ in inspect(tmp_path / "x.pt").bad}
    assert names == tree.keys()


class Live:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def make(path):
    """A function of the operating system with a visible effect."""
    return os.mkdir, os.fspath(path)


LIVE = {
    "a call": lambda path: Live(*make(path)),
    "operator.call": lambda path: Live(operator.call, *make(path)),
    "a partial that is called": lambda path: Live(functools.partial(*make(path))),
    "a partial of a partial": lambda path: Live(
        functools.partial(functools.partial(os.mkdir)), os.fspath(path)
    ),
    "map": lambda path: Live(list, Live(map, os.mkdir, [os.fspath(path)])),
    "filter": lambda path: Live(list, Live(filter, os.mkdir, [os.fspath(path)])),
    "starmap": lambda path: Live(list, Live(itertools.starmap, os.mkdir, [(os.fspath(path),)])),
    "a partial in a map": lambda path: Live(
        collections.deque, Live(map, functools.partial(os.mkdir), [os.fspath(path)])
    ),
    "iter of a function": lambda path: Live(list, Live(iter, functools.partial(*make(path)), None)),
    "reduce": lambda path: Live(functools.reduce, os.mkdir, [os.fspath(path), 0o777]),
    "accumulate": lambda path: Live(
        list, Live(itertools.accumulate, [os.fspath(path), 0o777], os.mkdir)
    ),
    "a caller of methods": lambda path: Live(operator.methodcaller("mkdir"), pathlib.Path(path)),
    "a method of a class": lambda path: Live(pathlib.Path.mkdir, pathlib.Path(path)),
    "a method of an object": lambda path: Live(pathlib.Path(path).mkdir),
    "eval": lambda path: Live(eval, f"__import__('os').mkdir({os.fspath(path)!r})"),
}


@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)
def test_calls_that_could_run_code_are_an_error(tmp_path, live):
    made = tmp_path / "made"
    raw = pickle.dumps(live(made))
    pickle.loads(raw)
    assert made.exists()
    made.rmdir()
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(UnsafeFile, match="would call"):
        inspect(tmp_path / "x.pt")
    assert not made.exists()


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "os.kill", "sys.modules.Module"])
@pytest.mark.parametrize("argument", ["true", 1], ids=["text", "number"])
def test_a_package_does_not_give_access_to_another_module(tmp_path, name, argument):
    short = pickle.dumps(name, protocol=4)[11:-2]  # without frame, memo and end
    raw = b"\x80\x04" + pickle.dumps(HERE, protocol=4)[11:-2] + short + b"\x93"
    raw += pickle.dumps(argument, protocol=2)[2:-1].replace(b"q\x00", b"") + b"\x85R."
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(UnsafeFile, match=f"would call {HERE}.{name}"):
        inspect(tmp_path / "x.pt")


def test_names_refused_by_torch_are_noted(tmp_path, capsys):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(1)}, path)
    assert "note" not in ckpt(capsys, "verify", path)[1]
    torch.save({"w": torch.ones(1), "color": Color.RED, "f": warm_up, "n": np.float64(1)}, path)
    status, out, _ = ckpt(capsys, "verify", path)
    assert status == 0
    assert f"refuses this file: {HERE}.Color, {HERE}.warm_up, numpy" in out and " and " in out


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_the_note_agrees_with_torch(tmp_path, value):
    torch.save({"value": value, "w": torch.ones(1)}, tmp_path / "x.pt")
    noted = refused_names(inspect(tmp_path / "x.pt").contents.names)
    try:
        torch.load(tmp_path / "x.pt", weights_only=True)
    except pickle.UnpicklingError:
        assert noted
    else:
        assert not noted


ARRAYS = {
    "complex128": np.array([1, complex(0, NAN)]),
    "array.array of doubles": array.array("d", [1, NAN]),
    "array.array of floats": array.array("f", [1, NAN]),
    "longdouble": np.array([1, NAN], dtype=np.longdouble),
    "clongdouble": np.array([1, complex(NAN, 0)], dtype=np.clongdouble),
    "big-endian": np.array([1, NAN], dtype=">f8"),
    "structured": np.array([(1, 2.0, 3), (1, NAN, 3)], dtype="i4,f8,u1"),
    "nested": np.array([((1, NAN), 2)], dtype=[("a", "i2,f2"), ("b", "f4")]),
    "record": np.rec.array([(1, NAN)], dtype="i4,f4"),
    "half": np.array([1, NAN], dtype=np.float16),
    "fortran": np.asfortranarray([[1, NAN], [1, 1]]),
    "matrix": np.asmatrix([[1, NAN]]),
    "a complex64": np.complex64(complex(NAN, 1)),
    "a clongdouble": np.clongdouble(complex(0, NAN)),
    "a structured scalar": np.array([(1, NAN)], dtype="i4,f4")[0],
}
UNREAD = {
    "objects": np.array([NAN, None, "a"], dtype=object),
    "fields of objects": np.array([(1, NAN)], dtype=[("a", "i4"), ("b", object)]),
    "masked": np.ma.masked_invalid([1, NAN]),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_every_number_are_read(tmp_path, array, protocol):
    torch.save({"a": array, "w": torch.ones(1)}, tmp_path / "x.pt", pickle_protocol=protocol)
    assert inspect(tmp_path / "x.pt").bad == (("a", 1, 0, 0),)


def test_a_longdouble_beyond_float64_is_finite(tmp_path):
    torch.save({"a": np.array([np.finfo(np.longdouble).max])}, tmp_path / "x.pt")
    assert inspect(tmp_path / "x.pt").bad == ()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("array", UNREAD.values(), ids=UNREAD)
def test_unread_values_are_reported(tmp_path, capsys, array, protocol):
    torch.save({"a": array, "w": torch.ones(1)}, tmp_path / "x.pt", pickle_protocol=protocol)
    status, out, _ = ckpt(capsys, "verify", tmp_path / "x.pt")
    assert status == 0
    assert "1 tensor, finite; 1 more not read" in out and "note: a was not read: " in out
    assert "all finite" not in out
    torch.save({"a": array}, tmp_path / "x.pt", pickle_protocol=protocol)
    assert "holds no tensors; 1 more not read" in ckpt(capsys, "verify", tmp_path / "x.pt")[1]
