"""The custom ops for torch.compile, one per stage."""

import math

import pytest
import torch
from torch import Tensor

import fastguard.functional.adaptive  # noqa: F401  (it defines an op, and imports the others)

NAN, INF = math.nan, math.inf
ops = torch.ops.fastguard
OPS = ("measure", "measure_tensors", "decide", "apply", "clip_value", "sanitize", "clip_units")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def some_grads() -> list[Tensor]:
    return [torch.tensor([3.0, 0.0]), torch.tensor([[0.0, -4.0]])]


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SUMMARY, COUNTS = float64(25, 0, 0, 0).reshape(4, 1), torch.zeros(3, 2, dtype=torch.int64)
# The values contain no NaN, because opcheck compares results and NaN does not equal itself.
BAD_SUMMARY = float64(25, 0, 1, 0).reshape(4, 1)
BAD_COUNTS = torch.tensor([[0, 0], [0, 1], [0, 0]])


@pytest.mark.parametrize("grads", [some_grads, list, lambda: [torch.tensor([NAN, 1.0])]])
@pytest.mark.parametrize("name", ["measure", "measure_tensors"])
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_opcheck_measure(name, grads, norm_type):
    torch.library.opcheck(getattr(ops, name).default, (grads(), norm_type))


@pytest.mark.parametrize(
    ("mode", "norm_type", "names"),
    [
        ("propagate", 2.0, None),
        ("propagate", INF, None),
        ("zero", INF, None),
        ("raise", 2.0, list("ab")),
    ],
)
def test_opcheck_decide(mode, norm_type, names):
    torch.library.opcheck(
        ops.decide.default, (SUMMARY, COUNTS, float64(1.0), norm_type, mode, names)
    )
    if mode != "raise":
        torch.library.opcheck(
            ops.decide.default, (BAD_SUMMARY, BAD_COUNTS, float64(INF), norm_type, mode, names)
        )


@pytest.mark.parametrize("grads", [some_grads, list])
def test_opcheck_apply_and_clip_value(grads):
    torch.library.opcheck(ops.apply.default, (grads(), float64(0.5), torch.ones(())))
    torch.library.opcheck(ops.clip_value.default, (grads(), float64(0.5)))


@pytest.mark.parametrize("grads", [some_grads, list, lambda: [torch.tensor([1 + 1j])]])
def test_opcheck_sanitize(grads):
    torch.library.opcheck(ops.sanitize.default, (grads(), float64(0.0, 1.0, -1.0)))


@pytest.mark.parametrize("mode", ["propagate", "zero"])
@pytest.mark.parametrize("limited", [[0, 1], [1], []])
def test_opcheck_clip_units(limited, mode):
    weights = [torch.ones_like(grad) for grad in some_grads()]
    given = some_grads(), weights, float64(0.01, 1e-3), limited, 2.0, mode, None
    torch.library.opcheck(ops.clip_units.default, given)


def test_every_op_has_an_opcheck():
    defined = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastguard::")}
    assert defined == {f"fastguard::{name}" for name in OPS}


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_outputs_share_no_memory_with_other_tensors(norm_type):
    # Compiled code may overwrite a returned tensor that it no longer needs.
    for mode in ("propagate", "zero"):
        summary = SUMMARY.clone()
        returned = [
            *ops.decide(summary, COUNTS, float64(INF), norm_type, mode, None),
            *ops.decide(summary, COUNTS, float64(INF), norm_type, mode, None),
        ]
        places = [t.untyped_storage().data_ptr() for t in (summary, *returned)]
        assert len(set(places)) == 7
