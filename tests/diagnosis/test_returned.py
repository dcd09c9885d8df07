"""What a step may return, and the findings for other results."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastguard import diagnose, explain_nonfinite
from guardtest.sound import by_kind, sound_batch, sound_model


def step_returning(form: Any) -> Any:
    def step(model: nn.Module, batch: Any) -> Any:
        output = model(batch[0])
        return form(functional.mse_loss(output, batch[1]), output)

    return step


@dataclass
class Result:
    loss: Tensor
    logits: Tensor


class ModelOutput(OrderedDict):
    """Like the class of transformers: a dict whose entries are also attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


Named = namedtuple("Named", "logits loss")

LOSSES = {
    "mapping": lambda loss, output: {"loss": loss, "logits": output},
    "log": lambda loss, output: {"loss": loss, "mse": loss.detach() * 2, "n": 3},
    "model-output": lambda loss, output: ModelOutput(loss=loss, logits=output),
    "data-class": lambda loss, output: Result(loss, output),
    "named-tuple": lambda loss, output: Named(output, loss),
    "loss-first": lambda loss, output: (loss, output),
    "loss-second": lambda loss, output: (output, loss),
    "parts-first": lambda loss, output: ({"a": loss / 2, "b": loss / 2}, output),
    "shape-1": lambda loss, output: [loss[None], output],
}


@pytest.mark.parametrize("form", LOSSES.values(), ids=LOSSES)
def test_the_loss_is_found_in_every_form_of_result(form) -> None:
    torch.manual_seed(0)
    model, batch = sound_model(), sound_batch()
    found = diagnose(model, batch, step=step_returning(form))
    assert found.ok, str(found)
    loss = functional.mse_loss(model(batch[0]), batch[1]).item()
    assert f"loss {loss:.4g} ->" in next(f.seen for f in found if f.check == "real steps")


NUMBERS = {
    "item": (lambda loss, _: loss.item(), "a float"),
    "float": (lambda loss, _: float(loss), "a float"),
    "numpy": (lambda loss, _: loss.detach().cpu().numpy(), "a ndarray"),
    "numpy-scalar": (lambda loss, _: loss.detach().numpy()[()], "a float32"),
    "in-a-dict": (
        lambda loss, output: {"loss": loss.item(), "logits": output},
        "a float in a dict",
    ),
    "parts": (lambda loss, _: {"a": loss.item(), "b": loss}, "a float in a dict"),
    "in-a-tuple": (lambda loss, output: (loss.item(), output), "a float in a tuple"),
}
DETACHED = {
    "detach": lambda loss, _: loss.detach(),
    "new-tensor": lambda loss, _: torch.tensor(loss.item()),
    "new-leaf": lambda loss, _: torch.tensor(loss.item(), requires_grad=True),
}


@pytest.mark.parametrize("form, what", NUMBERS.values(), ids=NUMBERS)
def test_a_loss_that_is_a_number_is_reported_as_detached(form, what: str) -> None:
    found = by_kind(diagnose(sound_model(), sound_batch(), step=step_returning(form)))
    assert f"the loss is detached: the step returned {what}," in found["loss-detached"].seen
    assert ".item()" in found["loss-detached"].remedy
    assert "loss-shape" not in found


@pytest.mark.parametrize("form", DETACHED.values(), ids=DETACHED)
def test_a_tensor_without_a_graph_is_reported_as_detached(form) -> None:
    found = diagnose(sound_model(), sound_batch(), step=step_returning(form))
    assert [f.kind for f in found.errors] == ["loss-detached"]
    assert found.of("not-checked")[-1].seen == "no steps were taken: the loss has no gradient"


def test_none_and_results_without_a_loss_are_reported() -> None:
    nothing = diagnose(sound_model(), sound_batch(), step=step_returning(lambda loss, _: None))
    assert "return loss" in nothing.of("loss-shape")[0].remedy
    form = lambda loss, output: {"logits": output, "n": 3}  # noqa: E731
    other = diagnose(sound_model(), sound_batch(), step=step_returning(form))
    assert "a dict" in other.of("loss-shape")[0].seen


def test_a_step_that_calls_backward_gets_a_remedy() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        loss = functional.mse_loss(model(batch[0]), batch[1])
        loss.backward()
        return loss

    found = by_kind(diagnose(sound_model(), sound_batch(), step=step))
    assert "not call backward or optimizer.step" in found["backward-raises"].remedy


class OwnLoss(nn.Module):
    def __init__(self, form: Any = lambda loss, output: loss) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(4, 1), form

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        output = self.layer(x)
        if targets is None:
            return output, None
        return self.form(functional.mse_loss(output, targets), output)


class Needs(OwnLoss):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return super().forward(x, y)


@pytest.mark.parametrize("model", [OwnLoss(), Needs()], ids=["optional", "required"])
def test_the_remedy_for_a_model_with_its_own_loss_is_a_step(model: nn.Module) -> None:
    found = diagnose(model, sound_batch())
    assert any("step=lambda model, batch: model(*batch)" in f.remedy for f in found), str(found)
    found = diagnose(model, sound_batch(), step=lambda model, batch: model(*batch))
    assert found.ok, str(found)


def test_a_model_with_its_own_loss_and_a_loss_fn_is_reported() -> None:
    x, y = sound_batch()
    found = by_kind(diagnose(OwnLoss(), ((x, y), y), functional.mse_loss))
    assert "looks like a loss that the model computed" in found["loss-shape"].seen
    assert "step=lambda model, batch: model(*batch[0])" in found["loss-shape"].remedy
    passed_on = diagnose(OwnLoss(), ((x, y), y), lambda output, targets: output)
    assert not passed_on.of("loss-shape")


def test_missing_labels_in_a_mapping_are_named() -> None:
    class Labeled(OwnLoss):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return super().forward(x, labels)

    x, y = sound_batch()
    found = diagnose(Labeled(), {"x": x})
    assert "add 'labels' to the batch" in found.of("not-checked")[0].remedy
    assert diagnose(Labeled(), {"x": x, "labels": y}).ok


def test_nan_in_other_results_of_the_step_is_not_reported() -> None:
    masked = lambda loss, output: {"loss": loss, "scores": output.detach().log()}  # noqa: E731
    assert not explain_nonfinite(sound_model(), sound_batch(), step=step_returning(masked)).found
