"""Operations and autograd nodes are classified into kinds with a remedy each."""

import math

import pytest

from fastguard.diagnosis.provenance.remedies import (
    KINDS,
    OTHER,
    base_name,
    evidence_of,
    kind_at,
    kind_of,
    remedy_at,
)
from fastguard.diagnosis.replay.tensor_range import TensorRange


@pytest.mark.parametrize(
    "operation, name",
    [
        ("aten.div_.Tensor", "div"),
        ("aten._softmax.default", "softmax"),
        ("DivBackward0", "div"),
        ("LinalgVectorNormBackward0", "linalg_vector_norm"),
        ("ToCopyBackward0", "to_copy"),
    ],
)
def test_operators_and_autograd_nodes_share_base_names(operation, name):
    assert base_name(operation) == name
    assert any(name in kind.operations for kind in KINDS)


def test_every_operation_belongs_to_at_most_one_kind():
    names = [name for kind in KINDS for name in kind.operations]
    assert len(names) == len(set(names))


def test_evidence_for_an_unknown_operation_is_only_non_finite_inputs():
    kind = kind_of("aten.sort.default")
    assert kind is OTHER and kind.remedy.startswith("check in the ranges")
    large = TensorRange("self", "float32", (2,), min=1.0, max=1e9, numel=2)
    bad = TensorRange("other", "float32", (2,), min=1.0, max=1.0, numel=2, nan=1)
    assert evidence_of(kind, [large]) == ""
    assert evidence_of(kind_of("aten.exp.default"), [large]) == "self reaches 1e+09"
    assert evidence_of(kind, [large, bad]) == "other holds a NaN or Inf"


def test_the_remedy_for_a_root_of_a_negative_number_is_a_clamp():
    negative = TensorRange("self", "float32", (2,), min=-1.0, max=1.0, numel=2)
    for operation in ("aten.sqrt.default", "aten.rsqrt.default"):
        remedy = remedy_at(operation, [negative])
        assert "clamp_min(0)" in remedy and "derivative" not in remedy
    assert "clamp_min(0)" not in remedy_at("aten.linalg_vector_norm.default", [negative])
    at_zero = TensorRange("self", "float32", (2,), min=0.0, max=1.0, numel=2, zeros=1)
    assert "infinite at 0" in remedy_at("aten.sqrt.default", [at_zero])
    norm = "aten.linalg_vector_norm.default"
    assert evidence_of(kind_of(norm), [negative], norm) == ""


def test_an_operation_on_empty_inputs_is_a_mean_of_no_values():
    empty = TensorRange("self", "float32", (0, 4), min=math.nan, max=math.nan, numel=0)
    full = TensorRange("target", "float32", (1,), min=1.0, max=1.0, numel=1)
    kind = kind_at("aten.mse_loss.default", [empty, empty])
    assert kind.name == "mean of nothing"
    assert evidence_of(kind, [empty]) == "self is empty"
    large = TensorRange("self", "float16", (2,), min=1.0, max=6e4, numel=2)
    assert evidence_of(kind, [large]) == "self reaches 6e+04"
    assert kind_at("aten.mse_loss.default", [full, full]).name == "sum or difference"
    assert kind_at("aten.mse_loss.default", []).name == "sum or difference"
