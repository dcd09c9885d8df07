"""Losses with the wrong kind of input are reported: probabilities for logits, or a wrong axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fastguard import Diagnosis, diagnose
from guardtest.kinds.setups import Between, mlp

KINDS = ("activated-twice", "wrong-form", "wrong-axis", "swapped-arguments")


def kinds_of(found: Diagnosis) -> list[tuple[str, str, str]]:
    return [(f.severity, f.kind, f.where) for f in found.of(*KINDS)]


def labels(n: int = 32, classes: int = 5) -> Tensor:
    return torch.arange(n) % classes


def network(*ends: nn.Module, out: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(mlp(8, 32, out), *ends)


def classify(end: nn.Module, loss: Callable[..., Tensor], target: Any = None, **more: Any) -> Any:
    batch = torch.randn(32, 8), labels() if target is None else target
    return kinds_of(diagnose(network(end), batch, loss, **more))


CE = nn.CrossEntropyLoss()
TWICE = [("error", "activated-twice", "input of cross_entropy")]
by_hand = Between(lambda z: z.exp() / z.exp().sum(1, keepdim=True))


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.Softmax(-1), by_hand, nn.Sigmoid()])
def test_an_activation_before_cross_entropy_is_reported(end: nn.Module) -> None:
    assert classify(end, CE) == TWICE
    assert classify(end, CE, autocast="bfloat16") == TWICE


def test_an_activation_in_compiled_functional_or_loss_code_is_reported() -> None:
    softmax_in_loss = lambda z, y: functional.cross_entropy(z.softmax(1).float(), y)  # noqa: E731
    assert classify(nn.Identity(), softmax_in_loss) == TWICE
    batch = torch.randn(32, 8), labels()
    assert kinds_of(diagnose(torch.compile(network(nn.Softmax(1))), batch, CE)) == TWICE

    def functional_style(model: nn.Module, batch: Any) -> Tensor:
        output = functional_call(model, dict(model.named_parameters()), (batch[0],))
        return functional.cross_entropy(torch.softmax(output, dim=1), batch[1])

    assert kinds_of(diagnose(network(), batch, step=functional_style)) == TWICE


def test_an_activation_before_a_handwritten_loss_is_reported() -> None:
    def likelihood(output: Tensor, target: Tensor) -> Tensor:
        return -output.log_softmax(1).gather(1, target[:, None]).mean()

    assert classify(nn.Softmax(1), likelihood)[0][1] == "activated-twice"
    assert classify(nn.Identity(), likelihood) == []


def test_a_softmax_over_channels_or_pixels_is_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Softmax2d())
    batch = torch.randn(4, 3, 8, 8), torch.arange(4 * 64).view(4, 8, 8) % 6
    assert kinds_of(diagnose(model, batch, CE)) == TWICE
    for dim in (2, 3):
        found = kinds_of(diagnose(nn.Sequential(model[0], nn.Softmax(dim)), batch, CE))
        assert found == [("error", "wrong-axis", "input of cross_entropy")]
    assert kinds_of(diagnose(model[0], batch, CE)) == []


def test_log_softmax_before_cross_entropy_is_only_a_note() -> None:
    found = classify(nn.LogSoftmax(1), CE)
    assert found == [("note", "activated-twice", "input of cross_entropy")]


@pytest.mark.parametrize(
    "loss", [nn.BCEWithLogitsLoss(), nn.MultiLabelSoftMarginLoss()], ids=["bce", "multilabel"]
)
@pytest.mark.parametrize("end", [nn.Sigmoid(), nn.Softmax(-1), nn.Hardsigmoid()])
def test_a_sigmoid_before_a_loss_with_logits_is_reported(loss: nn.Module, end: nn.Module) -> None:
    (found,) = classify(end, loss, torch.rand(32, 5).round())
    assert found[:2] == ("error", "activated-twice")
    assert classify(nn.Identity(), loss, torch.rand(32, 5).round()) == []


@pytest.mark.parametrize(
    "by_hand",
    [
        lambda z: 1 / (1 + (-z).exp()),
        lambda z: z.exp() / (1 + z.exp()),
        lambda z: z.clamp(0, 1)[:, None].squeeze(1),
    ],
    ids=["reciprocal", "quotient", "clamp"],
)
def test_a_handwritten_sigmoid_is_a_warning(by_hand) -> None:
    found = classify(Between(by_hand), nn.BCEWithLogitsLoss(), torch.rand(32, 5).round())
    assert [f[:2] for f in found] == [("warning", "activated-twice")]


def test_logits_between_0_and_1_are_not_reported() -> None:
    for scale in (0.1, 0.001):
        model = network(Between(lambda z, scale=scale: 0.5 + (z * scale).tanh() / 4))
        found = diagnose(model, (torch.randn(32, 8), torch.ones(32, 5)), nn.BCEWithLogitsLoss())
        assert kinds_of(found) == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_an_activation_in_scripted_code_is_reported() -> None:
    class Scripted(nn.Module):
        def __init__(self, end: nn.Module, out: int) -> None:
            super().__init__()
            self.inner = torch.jit.script(nn.Sequential(nn.Linear(8, out), end))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    x = torch.randn(32, 8)
    assert kinds_of(diagnose(Scripted(nn.Softmax(1), 5), (x, labels()), CE)) == TWICE
    logits = nn.BCEWithLogitsLoss()
    (found,) = kinds_of(diagnose(Scripted(nn.Sigmoid(), 1), (x, torch.ones(32, 1)), logits))
    assert found[:2] == ("error", "activated-twice")
    special = Between(torch.special.expit)
    assert classify(special, logits, torch.rand(32, 5).round())[0][:2] == found[:2]


def test_a_reshaped_sigmoid_is_reported() -> None:
    loss = lambda o, t: functional.binary_cross_entropy_with_logits(o[:, 0].double(), t)  # noqa: E731
    batch = torch.randn(8, 8), torch.ones(8).double()
    found = kinds_of(diagnose(network(nn.Sigmoid(), out=1), batch, loss))
    assert [f[:2] for f in found] == [("error", "activated-twice")]


def test_log_probabilities_before_a_loss_with_logits_are_reported() -> None:
    for end in (nn.LogSigmoid(), nn.LogSoftmax(1)):
        found = classify(end, nn.BCEWithLogitsLoss(), torch.rand(32, 5).round())
        assert [f[:2] for f in found] == [("error", "wrong-form")]


def test_logits_before_bce_loss_are_reported() -> None:
    found = classify(nn.Identity(), nn.BCELoss(), torch.rand(32, 5).round())
    assert found == [("error", "wrong-form", "input of binary_cross_entropy")]
    assert classify(nn.Sigmoid(), nn.BCELoss(), torch.rand(32, 5).round()) == []


@pytest.mark.parametrize(
    "end, kinds",
    [
        (nn.Identity(), ["wrong-form"]),
        (nn.Softmax(1), ["wrong-form"]),
        # One finding for the model and one for the loss.
        (nn.LogSoftmax(0), ["wrong-axis", "wrong-axis"]),
        (nn.LogSoftmax(1), []),
        (nn.Sequential(nn.Softmax(1), Between(lambda p: (p + 1e-4).log())), []),
    ],
    ids=["logits", "probabilities", "batch", "right", "log-of-softmax"],
)
def test_inputs_of_nll_loss_are_checked(end: nn.Module, kinds: list[str]) -> None:
    for autocast in (None, "bfloat16"):
        assert [f[1] for f in classify(end, nn.NLLLoss(), autocast=autocast)] == kinds


class Language(nn.Module):
    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Embedding(20, 16), nn.LSTM(16, 32, batch_first=True)
        self.head, self.end = nn.Linear(32, 20), end

    def forward(self, tokens: Tensor) -> Tensor:
        return self.end(self.head(self.recurrent(self.embed(tokens))[0]))


def flat_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize(
    "end, loss, kinds",
    [
        (nn.Identity(), flat_loss, []),
        (nn.Softmax(-1), flat_loss, ["activated-twice"]),
        (nn.Softmax(None), flat_loss, ["wrong-axis"]),  # Softmax(None) uses axis 0 of three
        (nn.Softmax(1), flat_loss, ["wrong-axis"]),
        (nn.Softmax(1), lambda o, t: functional.cross_entropy(o.mT, t), ["wrong-axis"]),
        (nn.LogSoftmax(1), lambda o, t: functional.nll_loss(o.mT, t), ["wrong-axis"]),
        (nn.LogSoftmax(-1), lambda o, t: functional.nll_loss(o.mT, t), []),
    ],
    ids=["right", "softmax", "implicit", "time", "time-kept", "nll-time", "nll"],
)
def test_losses_of_sequences_are_checked(end: nn.Module, loss: Any, kinds: list[str]) -> None:
    tokens = torch.randint(20, (8, 13))
    found = kinds_of(diagnose(Language(end), (tokens[:, :-1], tokens[:, 1:]), loss))
    assert [f[1] for f in found] == kinds


P = torch.rand(32, 5, generator=torch.Generator().manual_seed(1)).softmax(1)


@pytest.mark.parametrize(
    "end, target, log_target, expected",
    [
        (nn.LogSoftmax(1), P, False, []),
        (nn.LogSoftmax(1), P.log(), True, []),
        (nn.Softmax(1), P, False, [("error", "wrong-form", "input of kl_div")]),
        (nn.Identity(), P, False, [("error", "wrong-form", "input of kl_div")]),
        (nn.LogSoftmax(1), P.log(), False, [("error", "wrong-form", "target of kl_div")]),
        (nn.LogSoftmax(1), P, True, [("error", "wrong-form", "target of kl_div")]),
        (nn.Softmax(1), P.log(), False, [("error", "swapped-arguments", "input of kl_div")]),
    ],
    ids=["right", "right-log", "probabilities", "logits", "log-target", "no-log-target", "swapped"],
)
def test_arguments_of_kl_div_are_checked(
    end: nn.Module, target: Tensor, log_target, expected
) -> None:
    for loss in (
        nn.KLDivLoss(reduction="batchmean", log_target=log_target),
        lambda o, t: functional.kl_div(o, t, reduction="batchmean", log_target=log_target),
    ):
        assert classify(end, loss, target) == expected


def test_a_gradient_only_through_the_target_of_kl_div_is_reported() -> None:
    loss = lambda o, t: functional.kl_div(t.log(), o, reduction="batchmean")  # noqa: E731
    assert classify(nn.Softmax(1), loss, P) == [("warning", "swapped-arguments", "input of kl_div")]


def test_inputs_of_ctc_loss_are_checked() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.ctc_loss(output, target, (12,) * 4, (3,) * 4)

    batch = torch.randn(12, 4, 8), torch.arange(12).view(4, 3) % 4 + 1
    ends = (nn.Identity(), nn.Softmax(-1), nn.LogSoftmax(1), nn.LogSoftmax(-1))
    kinds = [[f[1] for f in kinds_of(diagnose(network(end), batch, loss))] for end in ends]
    assert kinds == [["wrong-form"], ["wrong-form"], ["wrong-axis"], []]


@pytest.mark.parametrize("as_given", [torch.tensor, tuple], ids=["tensors", "tuples"])
@pytest.mark.parametrize(
    "inputs, lengths, expected",
    [
        ((2, 2), (3, 3), "error"),
        ((3, 2), (3, 3), "note"),
        ((4, 4), (4, 4), "error"),  # two equal neighbors need a blank between them
        ((12, 12), (4, 4), None),
    ],
    ids=["none-left", "one-left", "repeats", "all-left"],
)
def test_samples_that_ctc_loss_drops_are_reported(inputs, lengths, expected, as_given) -> None:
    target = torch.tensor([[1, 2, 3, 3], [2, 3, 3, 1]])[:, : lengths[0]]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        settings = {"zero_infinity": True}
        return functional.ctc_loss(output, target, as_given(inputs), as_given(lengths), **settings)

    batch = torch.randn(12, 2, 8), target
    found = diagnose(network(nn.LogSoftmax(-1)), batch, loss)
    of_lengths = found.of("unaligned-targets")
    assert [f.severity for f in of_lengths] == ([expected] if expected else [])
    for finding in found.of("all-gradients-zero"):
        assert expected == "error" and "ReLU" not in finding.remedy
    assert bool(found.of("all-gradients-zero")) == (expected == "error")


# Samples that depend on each other.


class Attends(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.head, self.dim = nn.Linear(8, 8), nn.Linear(8, 5), dim

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ x.mT, dim=self.dim)
        return self.head((weights @ x).mean(1))


class Last(nn.Module):
    """Classifies by the last state of a layer, which may expect (time, batch)."""

    def __init__(self, layer: nn.Module, turned: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.turned = layer, nn.Linear(8, 5), turned

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turned else x
        out = self.layer(x)
        out = out[0] if isinstance(out, tuple) else out
        return self.head(out[-1] if self.turned else out[:, -1])


def encoder(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)


@pytest.mark.parametrize(
    "model, where",
    [
        (Attends(0), "the model (Attends)"),
        (Attends(-1), None),
        (Last(nn.GRU(8, 8)), "layer (GRU)"),
        (Last(nn.GRU(8, 8, batch_first=True)), None),
        (Last(nn.LSTM(8, 8), turned=True), None),
        (Last(encoder(False)), "layer.self_attn (MultiheadAttention)"),
        (Last(encoder(True)), None),
        (Last(encoder(False), turned=True), None),
    ],
)
def test_samples_that_depend_on_each_other_are_reported(
    model: nn.Module, where: str | None
) -> None:
    found = diagnose(model, (torch.randn(16, 6, 8), labels(16)), CE)
    assert [f.where for f in found.of("wrong-axis")] == ([where] if where else [])


def test_a_softmax_over_time_is_not_reported() -> None:
    """Axis 0 may be the time if there is not one target per sample."""
    batch = torch.randn(6, 16, 8), labels(96).view(6, 16)

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.head = nn.Linear(8, 1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            pooled = (self.score(x).softmax(0) * x).sum(0, keepdim=True)
            return self.head(x + pooled)

    assert kinds_of(diagnose(Causal(), batch, flat_loss)) == []
