"""Strict JSON contains no NaN, loses nothing, and can be read back."""

import json
import math
from pathlib import Path

import pytest
import torch

from fastguard import StepRecord
from fastguard.records.strict_json import dumps, encode, shortened, strict


def no_constants(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_numbers_become_strings_that_float_can_parse(value):
    text = json.loads(dumps(value), parse_constant=no_constants)
    assert isinstance(text, str)
    assert repr(float(text)) == repr(value)


@pytest.mark.parametrize("value", [1, 1.5, 0.1, True, None, "NaN", "σ", [1, [2.5]], {"a": {}}])
def test_json_values_are_unchanged(value):
    assert json.loads(dumps(value)) == value


def test_other_values_become_text():
    assert strict({3: (1, Path("a/b"))}) == {"3": [1, "a/b"]}
    assert strict(torch.tensor(3)) == "tensor(3)"


def test_a_record_as_json_has_every_field():
    record = StepRecord(
        step=7,
        total_norm=math.inf,
        clip_coef=0.5,
        action="skipped",
        reason="nonfinite_grad",
        nan=2,
        culprits=(("head.weight", 2, 0, 0),),
        n_culprits=1,
        losses={"loss": math.nan},
        thresholds={"grad_norm": math.inf},
        tag=("epoch 1", 3),
        culprit_ranks=1,
        culprit_rank=3,
        watch={"tensor_norms": {"head.weight": math.inf}, "replica_drift": {"weights": [2]}},
        time=1.7e9,
    )
    read = json.loads(dumps(record.as_dict()), parse_constant=no_constants)
    assert read == {
        "step": 7,
        "total_norm": "Infinity",
        "clip_coef": 0.5,
        "action": "skipped",
        "reason": "nonfinite_grad",
        "nan": 2,
        "posinf": 0,
        "neginf": 0,
        "culprits": [["head.weight", 2, 0, 0]],
        "n_culprits": 1,
        "losses": {"loss": "NaN"},
        "spikes": [],
        "thresholds": {"grad_norm": "Infinity"},
        "consecutive_skips": 0,
        "lr": "NaN",
        "tag": ["epoch 1", 3],
        "culprit_ranks": 1,
        "culprit_rank": 3,
        "limit": "Infinity",
        "clipped_units": 0,
        "limited_units": 0,
        "most_clipped_unit": None,
        "watch": {"tensor_norms": {"head.weight": "Infinity"}, "replica_drift": {"weights": [2]}},
        "time": 1.7e9,
    }


DEEP: list = []
for _ in range(3000):
    DEEP = [DEEP]
CYCLE: dict = {}
CYCLE["self"] = [CYCLE, CYCLE]


class Raises:
    def __str__(self):
        raise KeyError("no")

    __repr__ = __str__


class NoItems(dict):
    def items(self):
        raise RuntimeError("changed meanwhile")


@pytest.mark.parametrize(
    "value",
    [
        DEEP,
        CYCLE,
        10**5000,
        -(10**5000),
        [10**5000] * 10_000,
        "x" * 10**7,
        "\U000e0001" * 10**6,
        {"k" * 10**6: 1, 2: "\0" * 10**6},
        list(range(10**6)),
        Raises(),
        [Raises(), {Raises(): Raises()}],
        NoItems(a=1),
        {10**5000: 1},
        b"\xff" * 10**6,
        math.nan,
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_gives_a_line_that_readers_accept(value):
    line = encode(shortened(value))
    assert len(line.encode()) < 400_000  # bytes; readers accept 512 KiB
    assert line.isprintable()
    json.loads(line, parse_constant=no_constants)


@pytest.mark.parametrize(
    "value", [None, True, 3, -(10**300), 0.1, "σ" * 1000, [1, [2.5]], {"a": {}}]
)
def test_small_values_are_not_shortened(value):
    assert shortened(value) == strict(value)


def test_omitted_parts_are_marked():
    assert shortened("abcdefghij", room=10) == "abcde…"
    assert shortened(list(range(100)), room=20)[-1] == "…"
    assert shortened({"a": 1, "b": "x" * 50, "c": 2}, room=30)["…"] == "…"
    assert shortened([Raises(), 3]) == ["<Raises that cannot be shown: KeyError>", 3]
    assert shortened(16**300) == "0x8000000000000000… (1201 bits)"


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x9b", "\u202e", "\u2028", "\x85", "\u200b", "\udce9", "\U000e0041"]
)
def test_json_has_no_control_characters_and_can_be_encoded(text, indent):
    line = dumps({text: [text, "é損"]}, indent=indent)
    assert line.replace("\n", "").isprintable() and line.encode()
    assert "é損" in line
    assert json.loads(line) == {text: [text, "é損"]}
