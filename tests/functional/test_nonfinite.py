"""NaN and Inf in gradients for each mode, and extreme values of `max_norm`."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad as torchs

import fastguard
from fastguard import NonFiniteGradError
from guardtest.grads import (
    NORM_TYPES,
    assert_bitwise_equal,
    assert_same_grads,
    copies,
    parameters,
    true_norm,
)
from guardtest.tolerances import NORM_RTOL

NAN, INF = math.nan, math.inf


# Parity: NaN and Inf.


@pytest.mark.parametrize("max_norm", [1.0, 0.0, 1e9])
@pytest.mark.parametrize("bad", [(NAN,), (INF,), (-INF,), (INF, -INF), (NAN, INF)])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_propagate_gives_the_same_result_as_torch(norm_type, bad, max_norm):
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
def test_error_if_nonfinite_raises_the_error_type_of_torch_and_changes_nothing(norm_type, bad):
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


@pytest.mark.parametrize("norm_type", [2, 2.0, 1.5, INF])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_error_begins_with_torchs_message_and_names_the_culprits(norm_type, compiled):
    params = parameters(torch.tensor([3.0, NAN]), torch.tensor([INF]))
    grads = [p.grad for p in params]
    with pytest.raises(RuntimeError) as torch_says:
        torchs.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    flat = fastguard.FlatGradBuckets(copies(params))
    calls = [
        lambda: fastguard.clip_grad_norm_(params, 1.0, norm_type, True),
        lambda: fastguard.clip_grad_norm_(params, 1.0, norm_type, True, nonfinite="raise"),
        lambda: fastguard.get_total_norm(grads, norm_type, True),
    ]
    if compiled:
        torch._dynamo.reset()
        calls = [torch.compile(call, fullgraph=True, backend="aot_eager") for call in calls]
    else:
        calls.append(lambda: flat.clip_grad_norm_(1.0, norm_type, True))
    for call in calls:
        with pytest.raises(NonFiniteGradError) as ours:
            call()
        start, rest = str(ours.value)[: len(str(torch_says.value))], str(ours.value)
        assert start == str(torch_says.value)
        assert "parameter 0 (1 NaN), parameter 1 (1 +Inf); nothing was changed" in rest


def test_raise_mode_does_not_mention_torchs_argument():
    params = parameters(torch.tensor([NAN]))
    with pytest.raises(NonFiniteGradError, match=r"^gradients are non-finite"):
        fastguard.clip_grad_norm_(params, 1.0, nonfinite="raise")


def test_error_if_nonfinite_does_not_raise_for_finite_gradients():
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
def test_zero_mode_equals_torch_on_a_cleaned_copy(max_norm, norm_type, dtype):
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
    # The error of torch's norm, which has the dtype of the gradients.
    own_error = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(norm.double(), expected.double(), rtol=own_error, atol=0)
    assert_same_grads(ours, theirs, rtol=2 * own_error)


def test_zero_mode_with_only_bad_elements():
    ours = parameters(torch.full((3,), NAN))
    assert fastguard.clip_grad_norm_(ours, 1.0, nonfinite="zero") == 0.0
    assert ours[0].grad.tolist() == [0.0, 0.0, 0.0]


# Extreme values of max_norm.


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


def test_max_norm_inf_with_an_infinite_element_does_not_change_the_others():
    # torch makes every gradient NaN here.
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


def test_coefficient_one_changes_no_bit():
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
