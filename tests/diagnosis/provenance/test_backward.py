"""If the loss is finite, the autograd node that produced the first bad gradient is found."""

import math

import pytest
import torch
from torch import nn

from fastguard import explain_nonfinite
from guardtest.chains import Call, chain, mean, zeros

BACKWARD = {
    "sqrt at 0": (lambda x: x.abs().sqrt(), "SqrtBackward0", "square root or norm"),
    "pow at 0": (lambda x: x.abs() ** 0.5, "PowBackward0", "power"),
    "norm at 0": (
        lambda x: (x.square().sum(-1, keepdim=True) ** 0.5).expand(2, 4),
        "PowBackward0",
        "power",
    ),
    "where after it": (
        lambda x: torch.where(x > 0, x.sqrt(), x),
        "SqrtBackward0",
        "square root or norm",
    ),
    "log after it": (
        lambda x: torch.where(x > 0, torch.zeros_like(x), x) + (x * 0 + 1e-45).log() * 0.5,
        "LogBackward0",
        "logarithm",
    ),
}


@pytest.mark.parametrize("case", BACKWARD, ids=[c.replace(" ", "-") for c in BACKWARD])
def test_the_origin_of_a_nan_gradient_is_found(case):
    function, node, kind = BACKWARD[case]
    model = chain(Call(function))
    mean(model(zeros()[0])).backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters())

    report = explain_nonfinite(model, zeros(), mean)
    assert (report.origin, report.operation, report.kind) == ("backward", node, kind)
    assert report.module == "1 (Call)"
    assert report.source is not None and "test_backward.py" in report.source
    assert report.bad_gradients == ("0.weight",)
    assert report.inputs[0].name == "incoming gradient" and report.inputs[0].finite_share == 1
    assert any(r.name.startswith("saved") for r in report.inputs)
    assert report.outputs[0].nonfinite
    assert math.isfinite(report.loss["loss"])


def test_a_zero_norm_that_only_the_backward_pass_divides_by_is_found():
    """As in incident C, but the eps is in the wrong place, so the forward pass is finite."""

    def unit(x):
        return x / ((x * x).sum(-1, keepdim=True).sqrt() + 1e-6)

    report = explain_nonfinite(chain(Call(unit)), zeros(), mean)
    assert (report.origin, report.operation) == ("backward", "SqrtBackward0")
    assert "exactly 0" in report.evidence


def test_a_discarded_bad_gradient_is_not_reported():
    def discarded(x):  # the gradient of the root is Inf, but torch.where does not pass it on to x
        return torch.where(x > 1, x, torch.zeros_like(x)).sqrt()

    model = chain(Call(discarded))
    assert not explain_nonfinite(model, zeros(), mean).found

    # The backward of the root runs first.
    model = chain(Call(lambda x: x.abs() ** 0.5 + discarded(x)))
    assert explain_nonfinite(model, zeros(), mean).operation == "PowBackward0"


def test_a_forward_value_hidden_by_where_is_found_in_the_forward_pass():
    def hidden(x):
        return torch.where(x == 0, x, x * (1.0 / x))

    report = explain_nonfinite(chain(Call(hidden)), zeros(), mean)
    assert (report.origin, report.kind) == ("forward", "division")
    assert report.bad_gradients == ("0.weight",)
    assert "a factor in MulBackward0" in report.reached[-1]


def test_a_custom_function_with_a_wrong_backward_is_found():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x / 2

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return gradient / x

    report = explain_nonfinite(chain(Call(Half.apply)), zeros(), mean)
    assert (report.origin, report.operation) == ("backward", "HalfBackward")
    assert report.module == "1 (Call)"
    assert "saved tensor 0" in [r.name for r in report.inputs]


def test_an_overflow_caused_by_the_loss_scale_is_found():
    model = nn.Linear(4, 4).half()
    batch = torch.ones(2, 4).half(), None
    scaled = explain_nonfinite(model, batch, lambda y, _: y.sum(), loss_scale=2.0**16)
    assert scaled.origin == "backward"
    assert scaled.precision is True
    assert not explain_nonfinite(model, batch, lambda y, _: y.sum(), loss_scale=2.0**8).found
