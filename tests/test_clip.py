"""The drop-in functions: parity with torch.nn.utils, where torch is wrong, and what torch lacks."""

import inspect
import math
import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad as torchs

import fastguard
from fastguard import NonFiniteGradError
from guardtest.grads import assert_bitwise_equal, copies, grads_of, parameters, true_norm
from guardtest.tolerances import MEASURED_RTOL, NORM_RTOL, scale_rtol

NAN, INF = math.nan, math.inf
NORM_TYPES = [1.0, 2.0, 3.5, INF]
PAIRS = {
    "clip_grad_norm_": (fastguard.clip_grad_norm_, torch.nn.utils.clip_grad_norm_),
    "get_total_norm": (fastguard.get_total_norm, torch.nn.utils.get_total_norm),
    "clip_grads_with_norm_": (
        fastguard.clip_grads_with_norm_,
        torch.nn.utils.clip_grads_with_norm_,
    ),
    "clip_grad_value_": (fastguard.clip_grad_value_, torch.nn.utils.clip_grad_value_),
}

# torch.compile'd code is compared with eager code in test_ops.py.


def assert_same_grads(ours, theirs, rtol: float | None = None) -> None:
    for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
        if a is None or b is None:
            assert a is b
        else:
            tolerance = 2 * scale_rtol(a.dtype) if rtol is None else rtol
            torch.testing.assert_close(a, b, rtol=tolerance, atol=0, equal_nan=True)


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
def test_clip_grad_norm_is_torchs(case, norm_type, foreach):
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
def test_get_total_norm_is_torchs(case, norm_type, foreach):
    tensors = [g for g in model_grads()[case] if g is not None]
    got = fastguard.get_total_norm(tensors, norm_type, foreach=foreach)
    expected = torchs._get_total_norm(tensors, norm_type, foreach=foreach)
    torch.testing.assert_close(got, expected, rtol=torchs_rtol(case), atol=0)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("total_norm", [4.0, 0.1, 0.0, INF, NAN])
@pytest.mark.parametrize("case", CASES)
def test_clip_grads_with_norm_is_torchs(case, total_norm, foreach):
    ours = parameters(*model_grads()[case])
    theirs = copies(ours)
    norm = torch.tensor(total_norm)
    assert fastguard.clip_grads_with_norm_(ours, 1.0, norm, foreach) is None
    torchs._clip_grads_with_norm_(theirs, 1.0, norm, foreach)
    # torch computes the coefficient in float32, the dtype of the norm, also for float64 gradients
    assert_same_grads(ours, theirs, rtol=4 * scale_rtol(torch.float32))


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("clip_value", [0.5, 0.0, 1e9, INF])
@pytest.mark.parametrize("case", [case for case in CASES if case != "all None"])
def test_clip_grad_value_is_torchs(case, clip_value, foreach):
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


def test_max_norm_may_be_a_tensor_or_a_string_as_in_torch():
    for max_norm in (torch.tensor(1.0), "1.0", True):
        ours = parameters(torch.tensor([3.0, -4.0]))
        fastguard.clip_grad_norm_(ours, max_norm)
        assert ours[0].grad.tolist() == pytest.approx([0.6, -0.8], rel=1e-6)


# Parity: what "parameters" may be.


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


def test_a_models_generators():
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
def test_an_empty_list_and_no_gradients_pass_quietly(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FUNCTIONS[name]([])
        FUNCTIONS[name](parameters(None, None))
        FUNCTIONS[name](p for p in parameters(None))


@pytest.mark.parametrize("params", [[], parameters(None)])
def test_the_norm_of_nothing(params):
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


def test_gradients_that_have_a_graph_are_clipped_without_one():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    (w.grad,) = torch.autograd.grad((w**2).sum(), [w], create_graph=True)
    assert fastguard.clip_grad_norm_([w], 1.0) == 10.0
    assert fastguard.measure_grads([w]).total_norm.requires_grad is False
    assert w.grad.requires_grad


# Parity: NaN and Inf.


@pytest.mark.parametrize("max_norm", [1.0, 0.0, 1e9])
@pytest.mark.parametrize("bad", [(NAN,), (INF,), (-INF,), (INF, -INF), (NAN, INF)])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_propagate_is_what_torch_does(norm_type, bad, max_norm):
    ours = parameters(torch.tensor([3.0, -0.5, *bad]), torch.tensor([2.0]))
    theirs = copies(ours)
    got = fastguard.clip_grad_norm_(ours, max_norm, norm_type)
    expected = torchs.clip_grad_norm_(theirs, max_norm, norm_type)
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert_same_grads(ours, theirs)
    grads = [p.grad for p in theirs]
    total = fastguard.get_total_norm(grads, norm_type)
    torch.testing.assert_close(total, torchs._get_total_norm(grads, norm_type), equal_nan=True)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_error_if_nonfinite_raises_torchs_kind_of_error_and_changes_nothing(norm_type, bad):
    ours = parameters(torch.tensor([3.0, bad]), torch.tensor([4.0]))
    before = copies(ours)
    for call in (
        lambda: fastguard.clip_grad_norm_(ours, 1.0, norm_type, error_if_nonfinite=True),
        lambda: fastguard.clip_grad_norm_(ours, 1.0, norm_type, True),
        lambda: fastguard.clip_grad_norm_(ours, 1.0, norm_type, nonfinite="raise"),
        lambda: fastguard.get_total_norm([p.grad for p in ours], norm_type, True),
    ):
        with pytest.raises(RuntimeError, match=r"parameter 0 \(1 "):
            call()
    for a, b in zip(ours, before, strict=True):
        assert_bitwise_equal(a.grad, b.grad)


def test_error_if_nonfinite_is_quiet_when_all_is_finite():
    ours = parameters(torch.tensor([3.0, 4.0]))
    assert fastguard.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True) == 5.0
    assert ours[0].grad.norm() == pytest.approx(1.0, rel=1e-6)


def test_the_error_names_every_bad_parameter_with_its_counts():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[0].weight.grad[0] = torch.tensor([NAN, INF])
    model[1].bias.grad.fill_(-INF)
    with pytest.raises(
        NonFiniteGradError, match=r"0\.weight \(1 NaN, 1 \+Inf\), 1\.bias \(1 -Inf\)"
    ) as e:
        fastguard.clip_grad_norm_(model.named_parameters(), 1.0, nonfinite="raise")
    assert e.value.culprits == [("0.weight", 1, 1, 0), ("1.bias", 0, 0, 1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("max_norm", [1.0, 1e9, INF])
def test_zero_mode_is_torch_on_the_cleaned_copy(max_norm, norm_type, dtype):
    ours = parameters(
        torch.tensor([3.0, NAN, -4.0]).to(dtype),
        None,
        torch.tensor([[INF, 1.0], [-INF, NAN]]).to(dtype),
    )
    theirs = copies(ours)
    for p in theirs:
        if p.grad is not None:
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
    norm = fastguard.clip_grad_norm_(ours, max_norm, norm_type, nonfinite="zero")
    expected = torchs.clip_grad_norm_(theirs, max_norm, norm_type)
    assert norm.isfinite()
    own_error = 4 * torch.finfo(dtype).eps  # torch's norm, in the dtype of the gradients
    torch.testing.assert_close(norm.double(), expected.double(), rtol=own_error, atol=0)
    assert_same_grads(ours, theirs, rtol=2 * own_error)


def test_zero_mode_of_gradients_that_are_all_bad():
    ours = parameters(torch.full((3,), NAN))
    assert fastguard.clip_grad_norm_(ours, 1.0, nonfinite="zero") == 0.0
    assert ours[0].grad.tolist() == [0.0, 0.0, 0.0]


# max_norm at its ends.


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_max_norm_inf_measures_only(norm_type, nonfinite):
    grad = torch.tensor([3.0, -0.0, 1e30])
    (p,) = parameters(grad)
    before = grad.clone()
    norm = fastguard.clip_grad_norm_([p], INF, norm_type, nonfinite=nonfinite)
    assert norm.item() == pytest.approx(true_norm([before], norm_type), rel=NORM_RTOL)
    assert_bitwise_equal(grad, before)
    assert grad._version == 0


def test_max_norm_inf_with_one_infinite_element_leaves_the_others_alone():
    # Peer trap: torch turns every gradient NaN here.
    ours, theirs = ([torch.tensor([1.0, INF]), torch.tensor([2.0])] for _ in range(2))
    fastguard.clip_grad_norm_(parameters(*ours), INF)
    torchs.clip_grad_norm_(parameters(*theirs), INF)
    assert torch.cat(theirs).isnan().all()
    assert torch.cat(ours).tolist() == [1.0, INF, 2.0]
    fastguard.clip_grads_with_norm_(parameters(*ours), INF, torch.tensor(INF))
    assert torch.cat(ours).tolist() == [1.0, INF, 2.0]


def test_max_norm_zero_zeroes_the_gradients():
    ours = parameters(torch.tensor([3.0, -4.0]))
    assert fastguard.clip_grad_norm_(ours, 0.0) == 5.0
    assert ours[0].grad.tolist() == [0.0, -0.0]


def test_coefficient_one_leaves_every_bit_where_torch_may_not():
    grads = [torch.tensor([0.3, -0.0, 1e-45]), torch.tensor([0.1]).half()]
    before = [g.clone() for g in grads]
    fastguard.clip_grad_norm_(parameters(*grads), 10.0)
    for grad, was in zip(grads, before, strict=True):
        assert_bitwise_equal(grad, was)
        assert grad._version == 0


def test_norm_equal_to_max_norm_is_scaled_by_torchs_epsilon():
    ours = parameters(torch.tensor([3.0, 4.0]))
    theirs = copies(ours)
    fastguard.clip_grad_norm_(ours, 5.0)
    torchs.clip_grad_norm_(theirs, 5.0)
    assert_same_grads(ours, theirs)
    assert ours[0].grad[0] < 3.0


# Where torch's norm is wrong and ours is not.


def relative_error(norm: Tensor, tensors: list[Tensor], norm_type: float = 2.0) -> float:
    truth = true_norm(tensors, norm_type)
    return abs(norm.item() / truth - 1.0)


@pytest.mark.parametrize(
    ("tensor", "torchs_error"),
    [
        (lambda: torch.full((2**22,), 0.01), 1e-3),
        (lambda: torch.randn(2**22), 1e-5),
        (lambda: torch.randn(100_000).bfloat16(), 1e-4),
        (lambda: torch.randn(1000).bfloat16() * 0.1, 1e-4),
        (lambda: torch.randn(100_000).half(), 1e-5),
    ],
    ids=["constant", "normal", "bf16", "small bf16", "fp16"],
)
def test_norm_accuracy_where_torch_loses_digits(tensor, torchs_error):
    tensors = [tensor()]
    assert relative_error(torchs._get_total_norm(tensors), tensors) > torchs_error
    assert relative_error(fastguard.get_total_norm(tensors), tensors) < NORM_RTOL


@pytest.mark.parametrize(
    ("grad", "torchs_norm"),
    [
        (torch.full((10,), 6e4).half(), INF),
        (torch.full((10,), 1e20), INF),
        (torch.full((10,), 1.9e19), INF),  # a square above float32's largest number
        (torch.full((10,), 1e-25), 0.0),
        (torch.full((10,), 1e-30).bfloat16(), 0.0),
    ],
    ids=["fp16 overflows", "1e20", "1.9e19", "1e-25", "bf16 1e-30"],
)
def test_magnitudes_that_torch_cannot_square(grad, torchs_norm):
    # Peer trap: a finite element above 1.8e19 counts as overflow in fused norm kernels.
    assert torchs._get_total_norm([grad]) == torchs_norm
    norm = fastguard.get_total_norm([grad])
    assert norm.dtype is torch.float32
    assert relative_error(norm, [grad]) < NORM_RTOL
    assert fastguard.measure_grads(parameters(grad)).found_nonfinite == 0.0


def test_large_finite_gradients_are_clipped_where_torch_zeroes_them():
    ours = parameters(torch.tensor([3e20, -4e20]), torch.tensor([1.0]))
    theirs = copies(ours)
    assert torchs.clip_grad_norm_(theirs, 1.0) == INF
    assert theirs[0].grad.tolist() == [0.0, -0.0]
    assert fastguard.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True) == pytest.approx(5e20)
    assert ours[0].grad.tolist() == pytest.approx([0.6, -0.8])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-25, 1e-10, 1.0, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_magnitude_is_clipped_to_the_limit(dtype, magnitude):
    grads = [(torch.randn(n) * magnitude).to(dtype) for n in (10, 200)]
    truth = true_norm(grads)
    limit = truth * 0.25
    fastguard.clip_grad_norm_(parameters(*grads), limit)
    expected = truth * limit / (truth + 1e-6) if truth + 1e-6 > limit else truth
    if limit / (truth + 1e-6) > 1:
        expected = truth
    assert true_norm(grads) == pytest.approx(expected, rel=4 * scale_rtol(dtype))


def test_an_infinite_element_beside_a_huge_finite_one():
    grads = [torch.tensor([1e30]), torch.tensor([INF])]
    assert fastguard.get_total_norm(grads) == INF
    stats = fastguard.measure_grads(parameters(*grads))
    assert stats.culprits() == [("parameter 1", 0, 1, 0)]
    assert stats.total_norm == pytest.approx(1e30)


@pytest.mark.parametrize("where", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_inf_norm_keeps_nan(dtype, where):
    # Peer trap: max() by comparison drops NaN, which is larger than nothing.
    grads = [torch.ones(5).to(dtype), torch.arange(7.0).to(dtype)]
    grads[where][where] = NAN
    assert fastguard.get_total_norm(grads, INF).isnan()
    norm = fastguard.clip_grad_norm_(parameters(*grads), 1.0, INF, nonfinite="zero")
    assert norm == (6.0 if where != -1 else 5.0)


def test_a_nan_norm_counts_as_too_large_and_not_as_small_enough():
    # Peer trap: NaN > threshold is False.
    ours = parameters(torch.tensor([NAN, 5.0]))
    fastguard.clip_grad_norm_(ours, 1.0, nonfinite="zero")
    assert ours[0].grad.tolist() == pytest.approx([0.0, 1.0], rel=1e-6)


def test_scaling_never_multiplies_nan_by_zero():
    # Peer trap: 0 * NaN is NaN, so "multiply by 0 to skip" keeps the NaN.
    ours = parameters(torch.tensor([NAN, INF, 5.0]))
    fastguard.clip_grad_norm_(ours, 0.0, nonfinite="zero")
    assert ours[0].grad.tolist() == [0.0, 0.0, 0.0]


# dtypes and devices of what is returned; complex gradients.


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16,), torch.float32),
        ((torch.bfloat16,), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float64,), torch.float64),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_the_dtype_of_the_norm(dtypes, expected, norm_type):
    grads = [torch.ones(3, dtype=d) for d in dtypes]
    assert fastguard.get_total_norm(grads, norm_type).dtype is expected
    assert fastguard.clip_grad_norm_(parameters(*grads), 1.0, norm_type).dtype is expected
    grads[0][0] = NAN
    assert fastguard.clip_grad_norm_(parameters(*grads), 1.0, norm_type).dtype is expected


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_have_the_2_norm(dtype):
    grads = [torch.randn(5, dtype=dtype), torch.randn(3), torch.randn(2, 2, dtype=dtype).mH]
    ours = parameters(*grads)
    theirs = copies(ours)
    norm = fastguard.clip_grad_norm_(ours, 0.5)
    expected = torchs.clip_grad_norm_(theirs, 0.5)
    assert norm.dtype is (torch.float64 if dtype is torch.complex128 else torch.float32)
    torch.testing.assert_close(norm, expected.real.to(norm.dtype), rtol=1e-6, atol=0)
    for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_complex_gradients_refuse_the_rest_and_nothing_is_changed():
    grads = [torch.tensor([9.0, -9.0]), torch.tensor([9 + 9j])]
    before = [g.clone() for g in grads]
    params = parameters(*grads)
    for call in (
        lambda: fastguard.clip_grad_norm_(params, 1.0, 1.0),
        lambda: fastguard.get_total_norm(grads, INF),
        lambda: fastguard.measure_grads(params, norm_type=3.0),
        lambda: fastguard.clip_grad_value_(params, 1.0),
    ):
        with pytest.raises(TypeError, match="parameter 1 is complex"):
            call()
    for grad, was in zip(grads, before, strict=True):
        assert_bitwise_equal(
            torch.view_as_real(grad) if grad.is_complex() else grad,
            torch.view_as_real(was) if was.is_complex() else was,
        )


# Bad arguments: the value, the remedy, and nothing changed.

P = "parameters"
BAD = {
    "max_norm negative": (
        lambda ps: fastguard.clip_grad_norm_(ps, -1.0),
        ValueError,
        r"max_norm=-1\.0 must be >= 0.*inf",
    ),
    "max_norm NaN": (
        lambda ps: fastguard.clip_grad_norm_(ps, NAN),
        ValueError,
        "max_norm=nan must be >= 0",
    ),
    "max_norm None": (
        lambda ps: fastguard.clip_grad_norm_(ps, None),
        TypeError,
        "max_norm=None is not a number; use",
    ),
    "max_norm string": (
        lambda ps: fastguard.clip_grad_norm_(ps, "big"),
        TypeError,
        "max_norm='big'",
    ),
    "max_norm tensor": (
        lambda ps: fastguard.clip_grad_norm_(ps, torch.ones(2)),
        TypeError,
        "max_norm=tensor",
    ),
    "max_norm huge": (
        lambda ps: fastguard.clip_grad_norm_(ps, 10**400),
        TypeError,
        "max_norm=1000",
    ),
    "norm_type zero": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, 0),
        ValueError,
        "norm_type=0 is not a norm; use",
    ),
    "norm_type negative": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, -INF),
        ValueError,
        "norm_type=-inf",
    ),
    "norm_type string": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, "fro"),
        TypeError,
        "norm_type='fro'",
    ),
    "mode skip": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, nonfinite="skip"),
        ValueError,
        "nonfinite='skip'.*GuardedOptimizer",
    ),
    "mode unknown": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, nonfinite="drop"),
        ValueError,
        "use one of propagate, zero, raise",
    ),
    "two modes": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True, nonfinite="zero"),
        ValueError,
        "contradicts",
    ),
    "foreach": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, foreach="yes"),
        TypeError,
        "foreach='yes'",
    ),
    "group": (
        lambda ps: fastguard.clip_grad_norm_(ps, 1.0, group="world"),
        TypeError,
        "group='world'",
    ),
    "total_norm shape": (
        lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, torch.ones(2)),
        ValueError,
        r"total_norm .* shape \(2,\)",
    ),
    "total_norm None": (
        lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, None),
        TypeError,
        "total_norm=None",
    ),
    "with_norm max_norm": (
        lambda ps: fastguard.clip_grads_with_norm_(ps, -2.0, torch.tensor(1.0)),
        ValueError,
        r"max_norm=-2\.0",
    ),
    "with_norm foreach": (
        lambda ps: fastguard.clip_grads_with_norm_(ps, 1.0, torch.tensor(1.0), 3),
        TypeError,
        "foreach=3",
    ),
    "clip_value negative": (
        lambda ps: fastguard.clip_grad_value_(ps, -1.0),
        ValueError,
        r"clip_value=-1\.0 must be >= 0",
    ),
    "clip_value NaN": (
        lambda ps: fastguard.clip_grad_value_(ps, NAN),
        ValueError,
        "clip_value=nan",
    ),
    "clip_value string": (
        lambda ps: fastguard.clip_grad_value_(ps, "x"),
        TypeError,
        "clip_value='x'",
    ),
    "get_total_norm p": (
        lambda ps: fastguard.get_total_norm([p.grad for p in ps], -1),
        ValueError,
        "norm_type=-1",
    ),
    "get_total_norm of a number": (
        lambda ps: fastguard.get_total_norm(3),
        TypeError,
        "tensors=3 must be .*list of gradients",
    ),
    "get_total_norm of strings": (lambda ps: fastguard.get_total_norm(["g"]), TypeError, "'g'"),
    "nan fill": (
        lambda ps: fastguard.sanitize_grads_(ps, nan=NAN),
        ValueError,
        "nan=nan must be a finite number",
    ),
    "posinf fill": (lambda ps: fastguard.sanitize_grads_(ps, posinf="0"), ValueError, "posinf='0'"),
    "fill too large": (
        lambda ps: fastguard.sanitize_grads_(ps, neginf=-1e5),
        ValueError,
        r"neginf=-100000\.0 is infinite in torch\.float16",
    ),
    "measure p": (lambda ps: fastguard.measure_grads(ps, norm_type=0), ValueError, "norm_type=0"),
    "a module": (
        lambda ps: fastguard.clip_grad_norm_(nn.Linear(1, 1), 1.0),
        TypeError,
        r"pass model\.parameters\(\)",
    ),
    "a number": (
        lambda ps: fastguard.measure_grads(3),
        TypeError,
        r"parameters=3 must be .*model\.parameters\(\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_name_value_and_remedy_and_change_nothing(case):
    call, error, message = BAD[case]
    grads = [torch.tensor([30.0, NAN]), torch.tensor([-INF, 4.0]).half()]
    before = [g.clone() for g in grads]
    with pytest.raises(error, match=f"(?s){message}"):
        call(parameters(*grads))
    for grad, was in zip(grads, before, strict=True):
        assert_bitwise_equal(grad, was)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sparse_gradients_are_refused_and_the_dense_ones_unchanged(name):
    dense = torch.tensor([30.0, NAN])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    (p,) = parameters(dense)
    with pytest.raises(TypeError, match=r"(?s)emb is sparse.*sparse=False"):
        FUNCTIONS[name]([("p", p), ("emb", embedding.weight)])
    assert_bitwise_equal(dense, torch.tensor([30.0, NAN]))


# sanitize_grads_ and measure_grads.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sanitize_replaces_and_reports(dtype):
    grad = torch.tensor([NAN, 2.0, INF, -INF, NAN]).to(dtype)
    stats = fastguard.sanitize_grads_([("w", parameters(grad)[0])])
    assert grad.tolist() == [0.0, 2.0, 0.0, 0.0, 0.0]
    assert stats.culprits() == [("w", 2, 1, 1)]
    assert stats.total_norm == 2.0 and stats.found_nonfinite == 1.0


def test_sanitize_with_other_values():
    grads = [torch.tensor([NAN, 2.0, INF, -INF]), torch.tensor([NAN]).half()]
    fastguard.sanitize_grads_(parameters(*grads), nan=0.5, posinf=9, neginf=-8.0)
    assert [g.tolist() for g in grads] == [[0.5, 2.0, 9.0, -8.0], [0.5]]


def test_sanitize_cleans_each_part_of_a_complex_number():
    grad = torch.tensor([complex(NAN, 2.0), complex(1.0, INF)])
    stats = fastguard.sanitize_grads_(parameters(grad))
    assert grad.tolist() == [2j, 1 + 0j]
    assert stats.culprits() == [("parameter 0", 1, 1, 0)]


def test_sanitize_does_not_touch_clean_gradients():
    grad = torch.tensor([-0.0, 1.0])
    stats = fastguard.sanitize_grads_(parameters(grad))
    assert grad._version == 0
    assert stats.found_nonfinite == 0.0 and stats.culprits() == []


def test_measure_grads_of_a_model():
    model = nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, INF]])
    stats = fastguard.measure_grads(model.named_parameters())
    assert stats.total_norm == 3.0
    assert stats.power_sum.shape == (1,) and stats.nan_count.shape == (2,)
    assert stats.culprits() == [("weight", 0, 1, 0)]
    assert model.weight.grad._version == 0


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_measure_grads_per_tensor(norm_type):
    grads = [torch.randn(5), None, torch.randn(3).double(), torch.tensor([NAN, 2.0])]
    stats = fastguard.measure_grads(parameters(*grads), norm_type=norm_type, per_tensor=True)
    norms = [0.0 if g is None else true_norm([g], norm_type) for g in grads]
    assert stats.segment_norms.tolist() == pytest.approx(norms, rel=1e-12)
    assert stats.segment_counts.tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4]
    present = [g for g in grads if g is not None]
    assert stats.total_norm.item() == pytest.approx(true_norm(present, norm_type), rel=1e-12)


# Properties.

# A coefficient under 1e-38 is no normal float32 and has fewer digits: no such limits and norms.
finite = st.floats(-(2.0**110), 2.0**110, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
any_float = finite | st.sampled_from([NAN, INF, -INF])
norm_types = st.sampled_from(NORM_TYPES)
limits = st.floats(1e-3, 1e6) | st.sampled_from([0.0, 1e-3, 1.0, INF])


def lists_of(elements):
    tensors = st.lists(elements, max_size=8).map(lambda xs: torch.tensor(xs, dtype=torch.float32))
    return st.lists(tensors, min_size=1, max_size=4)


def norm_of(grads: list[Tensor], norm_type: float) -> float:
    return true_norm(grads, norm_type)


@hypothesis.given(lists_of(finite), limits, norm_types)
def test_clipping_never_increases_the_norm_and_reaches_the_limit(grads, max_norm, norm_type):
    before = norm_of(grads, norm_type)
    returned = fastguard.clip_grad_norm_(parameters(*grads), max_norm, norm_type)
    after = norm_of(grads, norm_type)
    assert after <= before
    assert after <= max_norm * (1 + 1e-6) + 1e-37
    assert returned.item() == pytest.approx(before, rel=NORM_RTOL, abs=1e-44)


@hypothesis.given(lists_of(finite), limits, norm_types)
def test_clipping_twice_is_clipping_once(grads, max_norm, norm_type):
    params = parameters(*grads)
    fastguard.clip_grad_norm_(params, max_norm, norm_type)
    once = [g.clone() for g in grads]
    fastguard.clip_grad_norm_(params, max_norm, norm_type)
    for grad, was in zip(grads, once, strict=True):
        # The second time the coefficient is max_norm / (max_norm + 1e-6).
        again = 1.0 if max_norm == INF else max_norm / (max_norm + 1e-6)
        torch.testing.assert_close(grad, was, rtol=1.0 - again + 4e-7, atol=1e-37)


@hypothesis.given(lists_of(finite), st.sampled_from([2.0**-17, 0.5, 2.0, 2.0**17]), norm_types)
def test_the_norm_is_scale_equivariant(grads, factor, norm_type):
    plain = fastguard.measure_grads(parameters(*grads), norm_type=norm_type)
    scaled = fastguard.measure_grads(parameters(*(g * factor for g in grads)), norm_type=norm_type)
    expected = plain.total_norm64.item() * factor
    assert scaled.total_norm64.item() == pytest.approx(expected, rel=1e-6, abs=1e-37)


@hypothesis.given(lists_of(st.floats(-1e6, 1e6, width=32)), norm_types)
def test_scaled_gradients_clip_to_the_same_direction(grads, norm_type):
    grads.append(torch.tensor([0.5]))  # so that torch's 1e-6 beside the norm is small
    limit = norm_of(grads, norm_type) / 4
    louder = [g * 4.0 for g in grads]
    fastguard.clip_grad_norm_(parameters(*grads), limit, norm_type)
    fastguard.clip_grad_norm_(parameters(*louder), limit, norm_type)
    for a, b in zip(grads, louder, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-35)


@hypothesis.given(lists_of(any_float), st.sampled_from([1e-3, 1.0, 1e6, INF]), norm_types)
def test_zero_mode_equals_torch_on_the_cleaned_copy(grads, max_norm, norm_type):
    cleaned = [g.nan_to_num(0.0, 0.0, 0.0).double() for g in grads if g.numel()]
    fastguard.clip_grad_norm_(parameters(*grads), max_norm, norm_type, nonfinite="zero")
    torchs.clip_grad_norm_(parameters(*cleaned), max_norm, norm_type)  # float64: no overflow
    for got, want in zip([g for g in grads if g.numel()], cleaned, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=4e-7, atol=1e-37)


@hypothesis.given(lists_of(st.floats(width=32)), norm_types)
def test_counts_are_exact(grads, norm_type):
    stats = fastguard.measure_grads(parameters(*grads), norm_type=norm_type)
    assert stats.nan_count.tolist() == [int(g.isnan().sum()) for g in grads]
    assert stats.posinf_count.tolist() == [int(g.isposinf().sum()) for g in grads]
    assert stats.neginf_count.tolist() == [int(g.isneginf().sum()) for g in grads]
    expected = norm_of(grads, norm_type)
    assert stats.total_norm64.item() == pytest.approx(expected, rel=MEASURED_RTOL, abs=0)
