"""Strict JSON: no NaN, nothing lost, and it reads back."""

import json
import math
from pathlib import Path

import pytest
import torch

from fastguard import StepRecord
from fastguard.strict_json import dumps, strict


def no_constants(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_numbers_are_strings_that_float_reads(value):
    text = json.loads(dumps(value), parse_constant=no_constants)
    assert isinstance(text, str)
    assert repr(float(text)) == repr(value)


@pytest.mark.parametrize("value", [1, 1.5, 0.1, True, None, "NaN", "σ", [1, [2.5]], {"a": {}}])
def test_what_json_holds_stays_as_it_is(value):
    assert json.loads(dumps(value)) == value


def test_what_json_does_not_hold_becomes_text():
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
    }
