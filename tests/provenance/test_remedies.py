"""Operations of both passes are sorted into kinds, and each kind has its remedy."""

import pytest

from fastguard.provenance.remedies import KINDS, OTHER, base_name, evidence_of, kind_of
from fastguard.provenance.report import TensorRange


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
def test_operators_and_nodes_have_one_name(operation, name):
    assert base_name(operation) == name
    assert any(name in kind.operations for kind in KINDS)


def test_no_operation_is_of_two_kinds():
    names = [name for kind in KINDS for name in kind.operations]
    assert len(names) == len(set(names))


def test_of_an_operation_of_no_kind_only_the_ranges_speak():
    kind = kind_of("aten.sort.default")
    assert kind is OTHER and kind.remedy.startswith("look at the ranges")
    large = TensorRange("self", "float32", (2,), min=1.0, max=1e9, numel=2)
    bad = TensorRange("other", "float32", (2,), min=1.0, max=1.0, numel=2, nan=1)
    assert evidence_of(kind, [large]) == ""
    assert evidence_of(kind_of("aten.exp.default"), [large]) == "self reaches 1e+09"
    assert evidence_of(kind, [large, bad]) == "other holds a NaN or Inf"
