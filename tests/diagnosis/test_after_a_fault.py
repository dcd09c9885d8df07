"""One fault does not hide the others: a diagnosis continues after errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastguard import diagnose
from guardtest.sound import by_kind, sound_batch, sound_model


def test_a_model_that_raises_still_gets_all_other_findings() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=0.0), nn.Linear(9, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inputs, targets = sound_batch()
    inputs[0, 0] = math.inf
    found = by_kind(diagnose(model, (inputs, targets), nn.MSELoss(), optimizer))
    assert found["forward-raises"].where == "2 (Linear)"
    assert "0 (Linear)" in found["nonfinite-activation"].seen
    assert {"lr-vanished", "norm-eps", "nonfinite-data"} <= found.keys()


def test_without_a_loss_the_backward_pass_starts_at_the_output() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    def broken_loss(output: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError("no loss today")

    found = by_kind(diagnose(Half(), sound_batch(), broken_loss))
    assert "no loss today" in found["loss-raises"].seen
    assert found["no-gradient"].where == "unused.weight"
    assert "contribute to the output" in found["no-gradient"].seen


def test_an_assertion_about_shapes_in_the_loss_is_reported_as_a_shape_mismatch() -> None:
    def strict_loss(output: Tensor, target: Tensor) -> Tensor:
        assert output.shape == target.shape, "shapes"
        return (output - target).square().mean()

    batch = torch.randn(2, 3, 4, 4), torch.rand(2, 1, 8, 8)
    found = by_kind(diagnose(nn.Conv2d(3, 1, 1), batch, strict_loss))
    assert "[2, 1, 4, 4], its target [2, 1, 8, 8]" in found["shape-mismatch"].seen
    assert found["shape-mismatch"].value == 4
    assert "loss-raises" not in found  # reported once


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 5, 3)])
def test_class_indices_and_class_scores_may_differ_in_shape(shape) -> None:
    """An error of the loss is then not reported as a shape mismatch."""

    def broken_loss(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError("weights")

    width = math.prod(shape[1:])
    model = nn.Sequential(nn.Linear(4, width), nn.Unflatten(1, shape[1:]))
    labels = torch.zeros([n for n in shape if n != 3], dtype=torch.long)
    found = by_kind(diagnose(model, (torch.randn(8, 4), labels), broken_loss))
    assert "loss-raises" in found and "shape-mismatch" not in found


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch) -> None:
    """The model works in the first pass only."""
    calls = []

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("only once")
            return self.layer(x)

    model = Moody()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = diagnose(model, sound_batch(), functional.mse_loss, optimizer)
    stopped = [f for f in found.of("not-checked") if "only once" in f.seen]
    assert {f.check for f in stopped} == {"optimizer", "real steps"}
    assert all(f.severity == "warning" for f in stopped)
    assert {"initialization", "data", "backward"} <= {f.check for f in found if f.severity == "ok"}


def test_both_kinds_of_activation_checkpoints_are_supported() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.model, self.reentrant = sound_model(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)

    for reentrant in (False, True):
        model = Checkpointed(reentrant)
        gradient = model.model[0].weight.grad = torch.ones(16, 4)
        found = diagnose(model, sound_batch(), functional.mse_loss)
        assert found.ok, str(found)
        assert model.model[0].weight.grad is gradient and model.model[0].bias.grad is None
        assert gradient.eq(1).all()


def test_a_bad_batch_does_not_hide_problems_of_the_model() -> None:
    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.norm(dim=1, keepdim=True)

    model = nn.Sequential(nn.Linear(4, 4, bias=False), Unit(), nn.Linear(4, 1))
    inputs, targets = sound_batch()
    inputs[0] = 0.0
    inputs[1, 2] = math.nan
    found = diagnose(model, (inputs, targets), nn.MSELoss()).of("nonfinite-activation")
    assert [f.where for f in found] == ["1 (Unit)", "0 (Linear)"]
    assert "the batch value batch[0] was already non-finite" in found[1].seen


def test_a_token_outside_the_vocabulary_is_reported() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 1))
    batch = torch.tensor([[1, 2], [3, 11]]), torch.randn(2, 1)
    found = by_kind(diagnose(model, batch, nn.MSELoss()))
    assert "from 1 to 11; expected 0 to 9" in found["index-out-of-range"].seen
    assert found["index-out-of-range"].where == "inputs"


def test_labels_of_further_batches_are_checked_against_the_loss() -> None:
    model = nn.Linear(4, 3)
    good = torch.randn(8, 4), torch.arange(8) % 3
    bad = torch.randn(8, 4), torch.arange(8) % 3 + 1
    found = by_kind(diagnose(model, good, nn.CrossEntropyLoss(), data=[good, bad]))
    assert found["index-out-of-range"].where == "data[1].targets"


@pytest.mark.parametrize(
    "norm, shape",
    [
        (nn.BatchNorm1d(4), (1, 4)),
        (nn.BatchNorm2d(4), (1, 4, 1, 1)),
        (nn.InstanceNorm1d(4), (2, 4, 1)),
        (nn.GroupNorm(4, 4), (1, 4)),
    ],
)
def test_a_norm_over_one_value_gets_a_remedy(norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(4, 1))
    found = by_kind(diagnose(model, (torch.randn(shape), torch.randn(shape[0], 1)), nn.MSELoss()))
    assert "more than 1" in found["forward-raises"].seen
    assert "drop_last=True" in found["forward-raises"].remedy
