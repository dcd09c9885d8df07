"""Operations of both passes are sorted into kinds, and each kind has its remedy."""

import pytest

from fastguard.provenance.remedies import KINDS, base_name


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
