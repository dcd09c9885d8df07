"""The operation of the forward pass that produced the first NaN or Inf is found."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastguard import explain_nonfinite
from guardtest.chains import Call, SegNet, chain, mean, zeros

NAN, INF = math.nan, math.inf


def test_a_division_by_a_zero_norm_is_found_in_its_module():
    model = SegNet()
    nn.init.zeros_(model.encoder[1].weight)  # the output and its norm are 0
    batch = torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    assert not F.cross_entropy(copy.deepcopy(model)(batch[0]), batch[1]).isfinite()

    report = explain_nonfinite(model, batch, F.cross_entropy)
    assert (report.origin, report.module) == ("forward", "refine (Refine)")
    assert (report.operation, report.kind) == ("aten.div.Tensor", "division")
    assert report.tensor == "output"
    assert report.source is not None and "normal / (normal.norm(" in report.source
    assert "denominators are exactly 0" in report.evidence
    assert [r.name for r in report.inputs] == ["self", "other"]
    assert report.inputs[1].absmax == 0.0 and report.inputs[1].finite_share == 1.0
    assert report.outputs[0].nan == report.outputs[0].numel
    assert report.reached[1].startswith("head (Conv2d): aten.convolution")
    assert report.already == ()
    for part in ("refine (Refine)", "aten.div.Tensor", "chains.py", "Remedy: bound the"):
        assert part in str(report)


FORWARD = {
    "log of 0": (lambda x: x.log(), "logarithm"),
    "log of less": (lambda x: (x - 1).log(), "logarithm"),
    "in place": (lambda x: x.mul(1.0).log_(), "logarithm"),
    "sqrt of less": (lambda x: (x - 1).sqrt(), "square root or norm"),
    "rsqrt": (lambda x: x.rsqrt(), "square root or norm"),
    "reciprocal": (lambda x: 1.0 / x, "division"),
    "exp": (lambda x: (x + 1000).exp(), "exponential or softmax"),
    "pow": (lambda x: x**-1.5, "power"),
    "acos": (lambda x: (x + 1.5).acos(), "inverse function at the edge of its domain"),
    "mean of nothing": (lambda x: x + x[:0].mean(), "mean of nothing"),
    "0 * inf": (lambda x: x * INF, "product"),
    "masked row": (
        lambda x: x.masked_fill(torch.ones_like(x, dtype=torch.bool), -INF).softmax(-1),
        "exponential or softmax",
    ),
    "inf - inf": (lambda x: x.masked_fill(x == 0, -INF) - (x - INF), "sum or difference"),
    "a NaN number": (lambda x: x + NAN, "sum or difference"),
}


@pytest.mark.parametrize("case", FORWARD, ids=[c.replace(" ", "-") for c in FORWARD])
def test_each_kind_of_operation_is_reported_with_a_remedy(case):
    function, kind = FORWARD[case]
    report = explain_nonfinite(chain(Call(function)), zeros(), mean)
    assert (report.origin, report.module, report.kind) == ("forward", "1 (Call)", kind)
    assert report.source is not None and "test_forward.py" in report.source
    assert report.remedy


def test_ranges_show_the_values_that_an_in_place_operation_overwrote():
    def halve(x):
        x = x + 2.0
        return x.div_(x - 2.0)

    report = explain_nonfinite(chain(Call(halve)), zeros(), mean)
    assert report.operation == "aten.div_.Tensor"
    assert (report.inputs[0].min, report.inputs[0].max) == (2.0, 2.0)


def test_an_attention_mask_is_not_an_origin():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), -INF).triu(1))
            self.out = nn.Linear(4, 4)

        def forward(self, x):
            weights = (x @ x.transpose(-1, -2) + self.mask).softmax(-1)
            hidden = torch.full_like(weights, INF)
            return self.out(torch.where(weights > 2, hidden, weights @ x)).log()

    torch.manual_seed(0)
    report = explain_nonfinite(Attention(), (torch.randn(2, 4, 4), None), mean)
    assert report.operation == "aten.log.default"
    assert "negative elements" in report.evidence
    assert [r.name for r in report.already] == ["mask"]


def test_a_fully_masked_row_of_multihead_attention_is_found():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1] = True  # the whole second sample is masked

    def step(model, batch):
        return model(batch, batch, batch, key_padding_mask=mask)[0].mean()

    report = explain_nonfinite(attention, x, step=step)
    assert report.origin == "forward"
    assert report.kind == "exponential or softmax"


def test_nan_that_never_reaches_the_loss_is_not_reported():
    def careful(x):
        bad = (x.detach() / 0.0).nan_to_num(0.0)
        return torch.where(x.isfinite(), x, x.detach() / 0) + bad

    report = explain_nonfinite(chain(Call(careful)), (torch.randn(2, 4), None), mean)
    assert not report.found
    assert str(report).startswith("Nothing found")


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (lambda loss: None, "the step returned no loss"),
        (lambda loss: loss.item(), "the step returned no loss"),
        (lambda loss: loss.detach(), "the loss does not require gradients"),
    ],
)
def test_gradients_that_were_not_computed_are_not_called_finite(returned, why):
    report = explain_nonfinite(
        nn.Linear(4, 1), torch.ones(2, 4), step=lambda model, x: returned(model(x).sum())
    )
    assert not report.found and why in report.no_backward
    assert f"There was no backward pass: {why}" in str(report) and "are finite" not in str(report)


def test_the_call_of_a_shared_module_is_numbered():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Call(lambda x: x.log())

        def forward(self, x):
            return self.block(self.block(x))

    report = explain_nonfinite(Shared(), (torch.ones(3), None), mean)
    assert report.module == "block (Call, call 2)"


def test_the_module_of_a_loss_is_named():
    class LogLoss(nn.Module):
        def forward(self, output, target):
            return -(target * output.relu().log()).mean()

    report = explain_nonfinite(nn.Linear(4, 4), (torch.zeros(2, 4), torch.ones(2, 4)), LogLoss())
    assert report.module == "loss_fn (LogLoss)"


def test_a_loss_with_only_ignored_targets_is_a_mean_of_no_values():
    batch = torch.randn(3, 4), torch.full((3,), -100)
    report = explain_nonfinite(nn.Linear(4, 5), batch, F.cross_entropy)
    assert report.kind == "mean of nothing"


def test_the_non_finite_part_of_a_dict_of_losses_is_explained():
    def step(model, batch):
        output = model(batch)
        return {"seg": output.mean(), "contour": (output * 0).sum().log()}

    report = explain_nonfinite(nn.Linear(4, 4), torch.randn(2, 4), step=step)
    assert math.isfinite(report.loss["seg"]) and report.loss["contour"] == -INF
    assert report.operation == "aten.log.default"


def test_without_a_loss_the_output_is_explained():
    report = explain_nonfinite(chain(Call(torch.log)), zeros())
    assert report.operation == "aten.log.default" and report.loss == {}


def test_a_mapping_is_passed_as_keywords_and_the_loss_of_the_output_is_used():
    class WithLoss(nn.Linear):
        def forward(self, x, labels):
            return {"loss": (super().forward(x) / labels).mean(), "logits": x}

    batch = {"x": torch.ones(2, 4), "labels": torch.zeros(2, 4)}
    report = explain_nonfinite(WithLoss(4, 4), batch)
    assert report.operation == "aten.div.Tensor"


def test_uninitialized_memory_is_explained():
    def leaky(x):
        return x + torch.empty(2, 4)

    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True)  # torch then fills empty tensors with NaN
        report = explain_nonfinite(chain(Call(leaky)), zeros(), mean)
    finally:
        torch.use_deterministic_algorithms(False)
    assert report.kind == "uninitialized memory"
