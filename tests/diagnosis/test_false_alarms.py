"""Deliberate and harmless setups are not reported as faults."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastguard import Diagnosis, GuardedOptimizer, diagnose
from guardtest.sound import by_kind, sound_batch, sound_model


def squeezing(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output.squeeze(1), target)


def all_pairs(output: Tensor, target: Tensor) -> Tensor:
    return (output[:, None] - target).square().sum(-1).sqrt().min(dim=1).values.mean()


def nearest(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().min(dim=1).values.mean()


def masked(output: Tensor, target: Tensor) -> Tensor:
    return ((output * (target > -9)) - target).square().mean()


@pytest.mark.parametrize(
    "width, target, loss_fn",
    [
        (1, lambda: torch.randn(8), squeezing),
        (2, lambda: torch.randn(5, 2), all_pairs),
        (1, lambda: torch.randn(1, 5), nearest),
        (3, lambda: torch.randn(8, 1).expand(8, 3), masked),
        (3, lambda: torch.randn(8, 1), masked),
        (3, lambda: torch.tensor([0, 1, 2, -100] * 2), nn.CrossEntropyLoss()),
        (3, lambda: torch.rand(8, 3).softmax(1), nn.CrossEntropyLoss()),
    ],
    ids=["squeezed", "all-pairs", "nearest", "expanded", "mask", "ignored", "soft-labels"],
)
def test_deliberate_broadcasting_is_not_an_error(width, target, loss_fn) -> None:
    found = diagnose(nn.Linear(4, width), (torch.randn(8, 4), target()), loss_fn)
    assert found.errors == [], str(found)


def test_an_attention_mask_among_the_inputs_is_not_an_error() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            scores = self.mix(x) @ x.mT + mask
            return scores.softmax(-1) @ x

    mask = torch.full((6, 6), -math.inf).triu(1)
    batch = (torch.randn(3, 6, 4), mask), torch.randn(3, 6, 4)
    found = diagnose(Attends(), batch, nn.MSELoss())
    assert found.errors == [], str(found)


def test_a_warm_up_from_zero_is_only_a_warning() -> None:
    model = sound_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))

    def severity() -> str:
        found = diagnose(model, sound_batch(), nn.MSELoss(), optimizer)
        return by_kind(found)["lr-vanished"].severity

    assert severity() == "warning"
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    assert severity() == "error"  # still 0 after the first step


def test_a_small_unused_head_is_a_warning_and_a_large_one_an_error() -> None:
    class Pooled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body, self.pooler = nn.Linear(4, 1000), nn.Linear(1, width)
            self.head = nn.Linear(1000, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    def severity(width: int) -> str:
        found = diagnose(Pooled(width), sound_batch(), nn.MSELoss())
        return by_kind(found)["no-gradient"].severity

    assert [severity(1), severity(1000)] == ["warning", "error"]


def test_an_adapter_initialized_to_zero_is_not_an_error() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(x) + self.up(self.down(x))

    inputs, _ = sound_batch()
    found = diagnose(Adapted(), (inputs, inputs.clone()), nn.MSELoss())
    assert found.errors == [], str(found)


def test_the_real_steps_of_a_guarded_optimizer_are_clipped() -> None:
    """Without clipping, this learning rate destroys the model."""

    def found(max_norm: float | None) -> Diagnosis:
        torch.manual_seed(0)
        model = sound_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        guarded = GuardedOptimizer(optimizer, max_norm=max_norm)
        loss = nn.MSELoss(reduction="sum")
        return diagnose(model, sound_batch(64), loss, guarded)

    assert found(None).of("does-not-fall", "diverges")
    assert found(0.01).of("does-not-fall", "diverges") == []
