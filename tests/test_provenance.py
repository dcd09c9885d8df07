"""explain_nonfinite: a bad batch runs again, and the birthplace of its first NaN is named."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastguard
from fastguard import explain_nonfinite
from fastguard.provenance.remedies import KINDS, base_name
from fastguard.snapshot import rng_state

NAN, INF = math.nan, math.inf


class Call(nn.Module):
    """A module that does one thing."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Refine(nn.Module):
    """The refinement of incident C: boundary normals of unit length."""

    def __init__(self, eps: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.eps = eps

    def forward(self, x):
        normal = self.conv(x)
        return x + normal / (normal.norm(dim=1, keepdim=True) + self.eps)


class SegNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.refine = Refine()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.refine(self.encoder(x)))


def chain(*modules, n: int = 4) -> nn.Sequential:
    """A layer with a gradient, then what is under test, then another layer."""
    first, last = nn.Linear(n, n, bias=False), nn.Linear(n, n)
    return nn.Sequential(first, *modules, last)


def mean(output: Tensor, _target: object = None) -> Tensor:
    return output.float().mean()


def zeros(n: int = 4):
    return torch.zeros(2, n), None


# Born in the forward pass.


def test_a_division_by_a_zero_norm_in_the_refinement_module():
    model = SegNet()
    nn.init.zeros_(model.encoder[1].weight)  # a dead stage: its output is 0, and so is the norm
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
    for part in ("refine (Refine)", "aten.div.Tensor", "test_provenance.py", "Remedy: give the"):
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
def test_each_kind_of_operation_is_named_with_its_remedy(case):
    function, kind = FORWARD[case]
    report = explain_nonfinite(chain(Call(function)), zeros(), mean)
    assert (report.origin, report.module, report.kind) == ("forward", "1 (Call)", kind)
    assert report.source is not None and "test_provenance.py" in report.source
    assert report.remedy


def test_what_an_in_place_operation_overwrote_is_in_the_ranges():
    def halve(x):
        x = x + 2.0
        return x.div_(x - 2.0)

    report = explain_nonfinite(chain(Call(halve)), zeros(), mean)
    assert report.operation == "aten.div_.Tensor"
    assert (report.inputs[0].min, report.inputs[0].max) == (2.0, 2.0)


def test_an_attention_mask_is_no_birth():
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


def test_multihead_attention_with_a_fully_masked_row():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1] = True  # nothing left to look at in the second sample

    def step(model, batch):
        return model(batch, batch, batch, key_padding_mask=mask)[0].mean()

    report = explain_nonfinite(attention, x, step=step)
    assert report.origin == "forward"
    assert report.kind == "exponential or softmax"


def test_what_never_reaches_the_loss_is_not_blamed():
    def careful(x):
        bad = (x.detach() / 0.0).nan_to_num(0.0)
        return torch.where(x.isfinite(), x, x.detach() / 0) + bad

    report = explain_nonfinite(chain(Call(careful)), (torch.randn(2, 4), None), mean)
    assert not report.found
    assert str(report).startswith("Nothing found")


def test_a_shared_module_says_which_call_it_was():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Call(lambda x: x.log())

        def forward(self, x):
            return self.block(self.block(x))

    report = explain_nonfinite(Shared(), (torch.ones(3), None), mean)
    assert report.module == "block (Call, call 2)"


def test_a_loss_that_is_a_module_is_named():
    class LogLoss(nn.Module):
        def forward(self, output, target):
            return -(target * output.relu().log()).mean()

    report = explain_nonfinite(nn.Linear(4, 4), (torch.zeros(2, 4), torch.ones(2, 4)), LogLoss())
    assert report.module == "loss_fn (LogLoss)"


def test_targets_that_are_all_ignored():
    batch = torch.randn(3, 4), torch.full((3,), -100)
    report = explain_nonfinite(nn.Linear(4, 5), batch, F.cross_entropy)
    assert report.kind == "mean of nothing"


def test_the_bad_part_of_a_dict_of_losses():
    def step(model, batch):
        output = model(batch)
        return {"seg": output.mean(), "contour": (output * 0).sum().log()}

    report = explain_nonfinite(nn.Linear(4, 4), torch.randn(2, 4), step=step)
    assert math.isfinite(report.loss["seg"]) and report.loss["contour"] == -INF
    assert report.operation == "aten.log.default"


def test_an_output_without_loss():
    report = explain_nonfinite(chain(Call(torch.log)), zeros())
    assert report.operation == "aten.log.default" and report.loss == {}


def test_a_mapping_goes_to_the_model_and_its_own_loss_counts():
    class WithLoss(nn.Linear):
        def forward(self, x, labels):
            return {"loss": (super().forward(x) / labels).mean(), "logits": x}

    batch = {"x": torch.ones(2, 4), "labels": torch.zeros(2, 4)}
    report = explain_nonfinite(WithLoss(4, 4), batch)
    assert report.operation == "aten.div.Tensor"


def test_uninitialised_memory():
    def leaky(x):
        return x + torch.empty(2, 4)

    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True)  # torch then fills empty tensors with NaN
        report = explain_nonfinite(chain(Call(leaky)), zeros(), mean)
    finally:
        torch.use_deterministic_algorithms(False)
    assert report.kind == "uninitialised memory"


# There before the step.


def test_nan_in_the_inputs():
    inputs = torch.randn(2, 4)
    inputs[1, 2] = NAN
    report = explain_nonfinite(chain(), (inputs, None), mean)
    assert (report.origin, report.tensor) == ("batch", "batch[0]")
    assert report.module == "0 (Linear)"
    assert report.inputs[0].nan == 1
    assert "check_batch" in report.remedy


def test_nan_in_the_targets():
    batch = {"inputs": torch.randn(2, 4), "targets": torch.tensor([[NAN, INF, 0, 0]] * 2)}
    report = explain_nonfinite(chain(), batch, F.mse_loss)
    assert (report.origin, report.tensor) == ("batch", "batch['targets']")
    assert (report.already[0].nan, report.already[0].posinf) == (2, 2)


@pytest.mark.parametrize("index, origin", [(3, "parameter"), (0, None)], ids=["hit", "missed"])
def test_a_nan_row_of_an_embedding_counts_only_if_the_batch_reads_it(index, origin):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[3] = NAN
    report = explain_nonfinite(model, (torch.tensor([[0, index]]), None), mean)
    assert report.origin == origin
    assert [r.name for r in report.already] == ["0.weight"]
    if origin:
        assert (report.tensor, report.module) == ("0.weight", "0 (Embedding)")


def test_a_running_variance_destroyed_by_an_earlier_batch():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var[0] = INF
    model[1].running_mean[0] = NAN
    report = explain_nonfinite(model, (torch.randn(2, 4), None), mean)
    assert (report.origin, report.module) == ("buffer", "1 (BatchNorm1d)")


# Born in the backward pass.

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
def test_a_finite_loss_with_a_nan_gradient(case):
    function, node, kind = BACKWARD[case]
    model = chain(Call(function))
    mean(model(zeros()[0])).backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters())  # torch has the problem

    report = explain_nonfinite(model, zeros(), mean)
    assert (report.origin, report.operation, report.kind) == ("backward", node, kind)
    assert report.module == "1 (Call)"
    assert report.source is not None and "test_provenance.py" in report.source
    assert report.bad_gradients == ("0.weight",)
    assert report.inputs[0].name == "incoming gradient" and report.inputs[0].finite_share == 1
    assert any(r.name.startswith("saved") for r in report.inputs)
    assert report.outputs[0].nonfinite
    assert math.isfinite(report.loss["loss"])


def test_a_norm_of_zero_that_only_the_backward_pass_divides_by():
    """Incident C once more: eps in the wrong place, so the forward pass is finite."""

    def unit(x):
        return x / ((x * x).sum(-1, keepdim=True).sqrt() + 1e-6)

    report = explain_nonfinite(chain(Call(unit)), zeros(), mean)
    assert (report.origin, report.operation) == ("backward", "SqrtBackward0")
    assert "exactly 0" in report.evidence


def test_a_bad_gradient_that_is_thrown_away_is_not_blamed():
    def thrown_away(x):  # Inf at the root, but torch.where passes no gradient on to x
        return torch.where(x > 1, x, torch.zeros_like(x)).sqrt()

    model = chain(Call(thrown_away))
    assert not explain_nonfinite(model, zeros(), mean).found

    model = chain(Call(lambda x: x.abs() ** 0.5 + thrown_away(x)))  # the root's backward runs first
    assert explain_nonfinite(model, zeros(), mean).operation == "PowBackward0"


def test_a_value_that_where_hid_in_the_forward_pass_is_found_there():
    def hidden(x):
        return torch.where(x == 0, x, x * (1.0 / x))

    report = explain_nonfinite(chain(Call(hidden)), zeros(), mean)
    assert (report.origin, report.kind) == ("forward", "division")
    assert report.bad_gradients == ("0.weight",)
    assert "a factor in MulBackward0" in report.reached[-1]


def test_a_custom_function_with_a_wrong_backward():
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


def test_a_loss_scale_that_overflows_float16():
    model = nn.Linear(4, 4).half()
    batch = torch.ones(2, 4).half(), None
    scaled = explain_nonfinite(model, batch, lambda y, _: y.sum(), loss_scale=2.0**16)
    assert scaled.origin == "backward"
    assert scaled.precision is True
    assert not explain_nonfinite(model, batch, lambda y, _: y.sum(), loss_scale=2.0**8).found


# Precision.


@pytest.mark.parametrize("to_blame", [True, False])
def test_float16_is_blamed_only_where_float32_is_finite(to_blame):
    def scores(x):
        return (x + 300.0).square() if to_blame else x / x

    model = nn.Sequential(nn.Linear(4, 4, bias=False), Call(scores)).half()
    report = explain_nonfinite(model, (torch.zeros(2, 4).half(), None), mean)
    assert (report.origin, report.module) == ("forward", "1 (Call)")
    assert report.precision is to_blame
    assert ("to blame, not the model" in str(report).replace("\n", " ")) is to_blame


def test_underflow_far_before_the_division_is_blamed_on_float16_too():
    model = nn.Sequential(Call(lambda x: 1e-5 * x * 1e-3), Call(lambda x: x / x)).half()
    report = explain_nonfinite(model, (torch.ones(4).half(), None), mean)
    assert report.module == "1 (Call)" and report.inputs[1].absmax == 0
    assert report.precision is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_a_cpu(dtype):
    class Scores(nn.Module):
        def forward(self, x):
            return (x @ x.T) * (1e34 if dtype is torch.bfloat16 else 1.0)

    batch = torch.full((2, 64), 100.0), None
    model = nn.Sequential(Scores())
    report = explain_nonfinite(model, batch, mean, autocast=torch.autocast("cpu", dtype))
    low = str(dtype).removeprefix("torch.")
    if dtype is torch.float16:
        assert report.module == "0 (Scores)"
        assert report.operation == "aten.mm.default"
        assert report.inputs[0].dtype == low
        assert report.precision is True
    else:  # its range is that of float32: nothing to blame on it
        assert report.precision is False
    assert not explain_nonfinite(nn.Sequential(Call(lambda x: x @ x.T)), batch, mean).found


def test_a_conversion_that_does_not_fit():
    report = explain_nonfinite(chain(Call(lambda x: (x + 1e5).half().float())), zeros(), mean)
    assert report.kind == "conversion to a narrower dtype"
    assert report.precision is True


# Leaves no trace.


class Restless(nn.Module):
    """Everything that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.last: Tensor | None = None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + 1
        with torch.no_grad():
            self.linear.weight.mul_(0.5)
        x.add_(random.random() + np.random.rand())
        self.last = self.drop(self.linear(self.norm(x)))
        self.train(not self.training)
        return self.last.log()


def test_nothing_is_changed_afterwards():
    model, x = Restless(), torch.randn(8, 4)
    model.linear.weight.grad = torch.full((4, 4), NAN)
    gradient, seen = model.linear.weight.grad, model.seen
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    inputs, generators = x.clone(), rng_state()
    report = explain_nonfinite(model, (x, None), mean)
    assert report.operation == "aten.log.default"
    assert (model.calls, model.last, model.training) == (0, None, True)
    assert model.seen is seen and model.linear.weight.grad is gradient
    assert model.linear.bias.grad is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert torch.equal(x, inputs)
    after = rng_state()
    assert after["python"] == generators["python"]
    assert all(
        np.array_equal(a, b) for a, b in zip(after["numpy"], generators["numpy"], strict=True)
    )
    assert torch.equal(after["torch"], generators["torch"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_everything_is_put_back_when_the_model_raises():
    def fail(x):
        torch.rand(3)
        raise RuntimeError("out of ideas")

    model = nn.Sequential(nn.BatchNorm1d(4), Call(fail))
    batch = torch.randn(8, 4), None
    generator = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of ideas"):
        explain_nonfinite(model, batch, mean)
    assert torch.equal(model[0].running_mean, torch.zeros(4))
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_replay_draws_the_random_numbers_of_the_bad_batch():
    """Only a mask that drops all four units makes this batch bad: then their sum is 0."""
    model = nn.Sequential(nn.Dropout(0.5), Call(lambda x: x / x.sum(-1, keepdim=True)))
    batch = torch.ones(1, 4), None

    def healthy(seed: int) -> bool:
        torch.manual_seed(seed)
        return bool(model(batch[0]).isfinite().all())

    bad = next(seed for seed in range(999) if not healthy(seed))
    torch.manual_seed(bad)
    before = rng_state()
    torch.manual_seed(next(seed for seed in range(999) if healthy(seed)))
    assert not explain_nonfinite(model, batch, mean).found
    report = explain_nonfinite(model, batch, mean, rng=before)
    assert report.operation == "aten.div.Tensor"
    assert str(explain_nonfinite(model, batch, mean, rng=before)) == str(report)


def test_the_graph_of_a_loss_in_the_making_stays_usable():
    model = SegNet()
    x = torch.randn(2, 3, 8, 8)
    loss = model(x).mean()
    explain_nonfinite(model.eval(), (x, None), mean)
    loss.backward()


def test_post_accumulate_hooks_do_not_fire():
    model = nn.Linear(2, 2)
    fired = []
    model.weight.register_post_accumulate_grad_hook(fired.append)
    explain_nonfinite(model, (torch.zeros(1, 2), None), mean)
    assert fired == []


# The rest.


def test_a_healthy_batch():
    report = explain_nonfinite(chain(), (torch.randn(2, 4), None), mean)
    assert (report.found, report.already, report.bad_gradients) == (False, (), ())
    assert "rng=" in str(report)


def test_a_compiled_model_is_looked_into():
    model = torch.compile(chain(Call(torch.log)), backend="eager")
    report = explain_nonfinite(model, zeros(), mean)
    assert report.module == "1 (Call)"


def test_a_guard_that_cleans_does_not_hide_the_birth():
    model = chain(Call(torch.log))
    with fastguard.ActivationGuard(model, mode="clean") as guard:
        assert model(zeros()[0]).isfinite().all()
        counted = guard.counts()
        report = explain_nonfinite(model, zeros(), mean)
        assert guard.counts() == counted
    assert report.operation == "aten.log.default"


def test_checkpointed_parts():
    def part(x):
        return torch.utils.checkpoint.checkpoint(lambda y: y.abs().sqrt(), x, use_reentrant=False)

    report = explain_nonfinite(chain(Call(part)), zeros(), mean)
    assert (report.origin, report.operation) == ("backward", "SqrtBackward0")


@pytest.mark.parametrize("batch", [torch.zeros(2), (1, 2, 3), None], ids=["tensor", "3", "none"])
def test_a_batch_of_no_known_kind_is_refused(batch):
    with pytest.raises(TypeError, match=r"pass \(inputs, targets\)"):
        explain_nonfinite(nn.Linear(2, 2), batch, mean)


def test_loss_fn_and_step_together_are_refused():
    with pytest.raises(TypeError, match="both"):
        explain_nonfinite(nn.Linear(2, 2), zeros(), mean, step=lambda m, b: None)


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
