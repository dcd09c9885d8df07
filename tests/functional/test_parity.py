"""The drop-in functions have the arguments and results of torch.nn.utils."""

import inspect
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad as torchs

import fastguard
from guardtest.grads import (
    NORM_TYPES,
    assert_bitwise_equal,
    assert_same_grads,
    copies,
    parameters,
    true_norm,
)
from guardtest.tolerances import scale_rtol

NAN, INF = math.nan, math.inf
PAIRS = {
    "clip_grad_norm_": (fastguard.clip_grad_norm_, torch.nn.utils.clip_grad_norm_),
    "get_total_norm": (fastguard.get_total_norm, torch.nn.utils.get_total_norm),
    "clip_grads_with_norm_": (
        fastguard.clip_grads_with_norm_,
        torch.nn.utils.clip_grads_with_norm_,
    ),
    "clip_grad_value_": (fastguard.clip_grad_value_, torch.nn.utils.clip_grad_value_),
}


# tests/functional/test_ops.py compares compiled code with eager code.


def model_grads() -> dict[str, list[Tensor | None]]:
    return {
        "one": [torch.randn(10)],
        "shapes": [torch.randn(3, 4), torch.randn(5), torch.randn(()), torch.randn(2, 3, 2)],
        "None among them": [None, torch.randn(5), None, torch.randn(3)],
        "all None": [None, None],
        "empty tensors": [torch.empty(0), torch.randn(4), torch.empty(2, 0)],
        "mixed dtypes": [torch.randn(5), torch.randn(7).double(), torch.randn(3)],
        "float64": [torch.randn(4).double(), torch.randn(2, 2).double()],
        "non-contiguous": [torch.randn(4, 6).T, torch.randn(8)[::2], torch.randn(3, 3)[:, 1:]],
        "zeros": [torch.zeros(4), torch.zeros(2)],
        "larger": [torch.randn(60, 500), torch.randn(500)],
    }


CASES = list(model_grads())


def torchs_rtol(case: str) -> float:
    return 1e-4 if case == "larger" else 1e-6  # one float32 sum over 30,000 elements


# Parity: arguments and results.


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_positional_arguments_and_defaults(name):
    ours, theirs = (inspect.signature(f).parameters for f in PAIRS[name])
    positional = [p for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("case", CASES)
def test_clip_grad_norm_equals_torchs(case, norm_type, foreach):
    ours = parameters(*model_grads()[case])
    for max_norm in (0.5, 1e9):
        params, theirs = copies(ours), copies(ours)
        got = fastguard.clip_grad_norm_(params, max_norm, norm_type, foreach=foreach)
        if case == "empty tensors" and norm_type == INF:
            # torch has no inf-norm of an empty tensor
            expected = torch.tensor(true_norm([p.grad for p in ours], INF)).float()
            torchs.clip_grad_norm_([theirs[1]], max_norm, norm_type)
        else:
            expected = torchs.clip_grad_norm_(theirs, max_norm, norm_type, foreach=foreach)
        assert got.shape == expected.shape == ()
        torch.testing.assert_close(got, expected, rtol=torchs_rtol(case), atol=0)
        assert_same_grads(params, theirs, rtol=torchs_rtol(case))


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "empty tensors"])
def test_get_total_norm_equals_torchs(case, norm_type, foreach):
    tensors = [g for g in model_grads()[case] if g is not None]
    got = fastguard.get_total_norm(tensors, norm_type, foreach=foreach)
    expected = torchs._get_total_norm(tensors, norm_type, foreach=foreach)
    torch.testing.assert_close(got, expected, rtol=torchs_rtol(case), atol=0)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("total_norm", [4.0, 0.1, 0.0, INF, NAN])
@pytest.mark.parametrize("case", CASES)
def test_clip_grads_with_norm_equals_torchs(case, total_norm, foreach):
    ours = parameters(*model_grads()[case])
    theirs = copies(ours)
    norm = torch.tensor(total_norm)
    assert fastguard.clip_grads_with_norm_(ours, 1.0, norm, foreach) is None
    torchs._clip_grads_with_norm_(theirs, 1.0, norm, foreach)
    # torch computes the coefficient in float32, the dtype of the norm, also for float64 gradients
    assert_same_grads(ours, theirs, rtol=4 * scale_rtol(torch.float32))


@pytest.mark.parametrize("total_norm", [4.0, torch.tensor(4.0)])
def test_the_default_device_changes_nothing(total_norm):
    (p,) = parameters(torch.ones(2))
    with torch.device("meta"):  # as after torch.set_default_device("cuda")
        fastguard.clip_grads_with_norm_([p], 1.0, total_norm)
    torch.testing.assert_close(p.grad, torch.full((2,), 0.25))


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("clip_value", [0.5, 0.0, 1e9, INF])
@pytest.mark.parametrize("case", [case for case in CASES if case != "all None"])
def test_clip_grad_value_equals_torchs(case, clip_value, foreach):
    ours = parameters(*model_grads()[case])
    theirs = copies(ours)
    assert fastguard.clip_grad_value_(ours, clip_value, foreach) is None
    torchs.clip_grad_value_(theirs, clip_value, foreach)
    assert_same_grads(ours, theirs, rtol=0.0)


def test_clip_grad_value_and_nonfinite_elements():
    ours = parameters(torch.tensor([NAN, INF, -INF, 0.5]))
    theirs = copies(ours)
    fastguard.clip_grad_value_(ours, 1.0)
    torchs.clip_grad_value_(theirs, 1.0)
    assert_same_grads(ours, theirs)
    assert ours[0].grad[0].isnan()


@pytest.mark.parametrize("norm_type", [2, "inf", "2", torch.tensor(2.0)])
def test_norm_types_that_torch_accepts(norm_type):
    ours = parameters(torch.tensor([3.0, -4.0]))
    theirs = copies(ours)
    got = fastguard.clip_grad_norm_(ours, 1, norm_type)
    assert got == torchs.clip_grad_norm_(theirs, 1, norm_type)
    assert_same_grads(ours, theirs)


def test_max_norm_may_be_any_kind_of_number():
    for max_norm in (1, torch.tensor(1.0), np.float32(1.0), np.int64(1), Fraction(1)):
        ours = parameters(torch.tensor([3.0, -4.0]))
        fastguard.clip_grad_norm_(ours, max_norm)
        assert ours[0].grad.tolist() == pytest.approx([0.6, -0.8], rel=1e-6)


# Parity: the argument `parameters`.


@pytest.mark.parametrize("clip", [fastguard.clip_grad_norm_, torchs.clip_grad_norm_])
def test_a_single_tensor(clip):
    (p,) = parameters(torch.tensor([3.0, 4.0]))
    assert clip(p, 1.0) == 5.0
    assert p.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


@pytest.mark.parametrize("clip", [fastguard.clip_grad_norm_, torchs.clip_grad_norm_])
def test_a_single_tensor_without_gradient(clip):
    assert clip(nn.Parameter(torch.ones(2)), 1.0) == 0.0


@pytest.mark.parametrize(
    "container", [list, tuple, iter, lambda ps: (p for p in ps), nn.ParameterList]
)
def test_containers(container):
    params = parameters(torch.tensor([3.0]), torch.tensor([4.0]))
    assert fastguard.clip_grad_norm_(container(params), 1.0) == 5.0
    assert [p.grad.item() for p in params] == pytest.approx([0.6, 0.8], rel=1e-6)


def test_the_generators_of_a_model():
    model = nn.Linear(3, 2)
    for generator in (model.parameters, model.named_parameters):
        model(torch.randn(5, 3)).sum().backward()
        norm = fastguard.get_total_norm([p.grad for p in model.parameters()])
        assert fastguard.clip_grad_norm_(generator(), norm.item() / 2) == norm
        left = fastguard.get_total_norm([p.grad for p in model.parameters()])
        assert left.item() == pytest.approx(norm.item() / 2, rel=2e-6)


FUNCTIONS = {
    "clip_grad_norm_": lambda ps: fastguard.clip_grad_norm_(ps, 1.0),
    "clip_grads_with_norm_": lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, torch.tensor(2.0)),
    "clip_grad_value_": lambda ps: fastguard.clip_grad_value_(ps, 1.0),
    "sanitize_grads_": lambda ps: fastguard.sanitize_grads_(ps),
    "measure_grads": lambda ps: fastguard.measure_grads(ps),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_empty_generator_gives_one_warning_at_the_callers_line(name):
    with pytest.warns(UserWarning, match="empty generator, no gradient clipping") as caught:
        FUNCTIONS[name](p for p in ())
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_empty_list_and_no_gradients_give_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FUNCTIONS[name]([])
        FUNCTIONS[name](parameters(None, None))
        FUNCTIONS[name](p for p in parameters(None))


@pytest.mark.parametrize("params", [[], parameters(None)])
def test_the_norm_without_gradients(params):
    norm = fastguard.clip_grad_norm_(params, 1.0)
    expected = torchs.clip_grad_norm_(params, 1.0)
    assert norm == expected == 0.0
    assert (norm.dtype, norm.shape, norm.device) == (expected.dtype, (), expected.device)
    assert fastguard.get_total_norm([]) == torchs._get_total_norm([]) == 0.0
    assert fastguard.measure_grads(params).total_norm == 0.0
    assert fastguard.measure_grads(params, per_tensor=True, norm_type=INF).total_norm == 0.0


def test_the_same_parameter_twice_counts_twice_as_in_torch():
    ours = parameters(torch.tensor([3.0]))
    theirs = copies(ours)
    assert fastguard.clip_grad_norm_(ours * 2, 1.0) == torchs.clip_grad_norm_(theirs * 2, 1.0)
    assert_same_grads(ours, theirs)


def test_gradients_with_a_graph_are_clipped_without_recording():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    (w.grad,) = torch.autograd.grad((w**2).sum(), [w], create_graph=True)
    assert fastguard.clip_grad_norm_([w], 1.0) == 10.0
    assert fastguard.measure_grads([w]).total_norm.requires_grad is False
    assert w.grad.requires_grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sparse_gradients_are_refused_and_the_dense_ones_unchanged(name):
    dense = torch.tensor([30.0, math.nan])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    (p,) = parameters(dense)
    with pytest.raises(TypeError, match=r"(?s)emb is sparse.*sparse=False"):
        FUNCTIONS[name]([("p", p), ("emb", embedding.weight)])
    assert_bitwise_equal(dense, torch.tensor([30.0, math.nan]))
