"""Optimizers that hold only a part of a model, and losses with several parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastguard import GuardedOptimizer, diagnose
from guardtest.sound import by_kind


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


def verdict(scores: Tensor, real: bool) -> Tensor:
    wanted = torch.full_like(scores, float(real))
    return functional.binary_cross_entropy_with_logits(scores, wanted)


def discriminator_step(model: GAN, batch: Tensor) -> Tensor:
    with torch.no_grad():
        fake = model.generator(torch.randn(len(batch), 4))
    return verdict(model.discriminator(batch), True) + verdict(model.discriminator(fake), False)


def generator_step(model: GAN, batch: Tensor) -> Tensor:
    return verdict(model.discriminator(model.generator(torch.randn(len(batch), 4))), True)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=2e-4, betas=(0.5, 0.999))


def test_each_half_of_a_gan_may_have_its_own_optimizer() -> None:
    torch.manual_seed(0)
    model, batch = GAN(), torch.randn(32, 8)
    discriminator = diagnose(model, batch, None, adam(model.discriminator), step=discriminator_step)
    assert discriminator.ok, str(discriminator)
    # Another optimizer trains the other half.
    assert discriminator.of("not-optimized")[0].severity == "note"
    generator = diagnose(model, batch, None, adam(model.generator), step=generator_step)
    assert generator.errors == [], str(generator)
    assert not generator.of("no-gradient")
    guarded = GuardedOptimizer(adam(model.discriminator), max_norm=1.0)
    assert diagnose(model, batch, None, guarded, step=discriminator_step).ok


def test_parameters_of_the_optimizer_must_contribute_to_the_loss() -> None:
    model, batch = GAN(), torch.randn(32, 8)
    both = by_kind(diagnose(model, batch, None, adam(model), step=discriminator_step))
    assert (
        both["no-gradient"].severity == "error"
        and "generator.0.weight" in both["no-gradient"].where
    )
    wrong = diagnose(model, batch, None, adam(model.generator), step=discriminator_step)
    assert [f.kind for f in wrong.errors] == ["loss-detached"]
    assert "that the optimizer holds" in wrong.errors[0].seen


def test_zero_gradients_are_reported_only_for_trained_parameters() -> None:
    model, batch = GAN(), torch.randn(32, 8)

    def dead(model: GAN, batch: Tensor) -> Tensor:
        made = model.generator(torch.randn(len(batch), 4)) * 0.0
        return verdict(model.discriminator(batch + made), True)

    found = by_kind(diagnose(model, batch, None, adam(model.generator), step=dead))
    assert found["all-gradients-zero"].severity == "error"
    assert not diagnose(model, batch, None, adam(model.discriminator), step=dead).errors


def test_only_parameters_of_the_optimizer_are_clipped() -> None:
    """The parameters outside the optimizer have gradients a million times larger."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(4, 1), nn.Linear(4, 1)

    def step(model: Halves, batch: Tensor) -> Tensor:
        return model.small(batch).square().mean() + 1e6 * model.large(batch).square().mean()

    torch.manual_seed(0)
    model = Halves()
    guard = GuardedOptimizer(torch.optim.SGD(model.small.parameters(), lr=0.1), max_norm=1.0)
    found = diagnose(model, torch.randn(8, 4), None, guard, step=step)
    assert not found.of("small-update", "does-not-fall", "exploding-gradient"), str(found)


def test_a_bias_whose_gradient_cancels_is_only_a_note() -> None:
    def critic(model: GAN, batch: Tensor) -> Tensor:
        fake = model.generator(torch.randn(len(batch), 4)).detach()
        return model.discriminator(fake).mean() - model.discriminator(batch).mean()

    torch.manual_seed(0)
    model = GAN()
    optimizer = torch.optim.RMSprop(model.discriminator.parameters(), lr=5e-5)
    found = diagnose(model, torch.randn(32, 8), None, optimizer, step=critic)
    assert found.ok, str(found)
    assert found.of("zero-gradient")[0].where == "discriminator.2.bias"


# Parts of a loss.


class ActorCritic(nn.Module):
    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.Tanh())
        self.other = self.body if shared else nn.Sequential(nn.Linear(8, 64), nn.Tanh())
        self.policy, self.value = nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(self.body(x)), self.value(self.other(x)).squeeze(-1)


def ppo(entropy: float = 0.01, value: float = 0.5) -> Callable[..., Any]:
    torch.manual_seed(0)
    actions, advantages, returns = torch.randint(4, (32,)), torch.randn(32), torch.randn(32) * 3
    advantages = (advantages - advantages.mean()) / advantages.std()

    def step(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        logits, values = model(batch)
        chosen = torch.distributions.Categorical(logits=logits)
        log_prob = chosen.log_prob(actions)
        ratio = (log_prob - log_prob.detach()).exp()
        clipped = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return {
            "policy": -clipped.mean(),
            "value": value * functional.mse_loss(values, returns),
            "entropy": -entropy * chosen.entropy().mean(),
        }

    return step


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("gain", [1.0, 0.01], ids=["usual", "nearly-uniform"])
def test_a_policy_loss_of_about_0_is_not_reported(shared: bool, gain: float) -> None:
    step = ppo()
    model, batch = ActorCritic(shared), torch.randn(32, 8)
    nn.init.orthogonal_(model.policy.weight, gain)
    nn.init.zeros_(model.policy.bias)
    found = diagnose(model, batch, step=step)
    assert found.ok, str(found)
    assert not found.of("loss-parts")
    assert abs(step(model, batch)["policy"].item()) < 1e-6


def test_a_part_with_a_negligible_gradient_is_reported() -> None:
    batch = torch.randn(32, 8)
    (entropy,) = diagnose(ActorCritic(), batch, step=ppo(entropy=1e-7)).of("loss-parts")
    assert (entropy.severity, entropy.where) == ("warning", "entropy")
    policy = diagnose(ActorCritic(), batch, step=ppo(value=1e5)).of("loss-parts")
    assert {f.where for f in policy} == {"policy", "entropy"}

    def step(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        logits, values = model(batch)
        fit = functional.cross_entropy(logits, torch.arange(32) % 4) + values.square().mean()
        return {"fit": fit, "large": 1.4 + 1e-7 * logits.square().mean()}

    (large,) = diagnose(ActorCritic(), batch, step=step).of("loss-parts")
    assert large.where == "large"


def test_parts_on_different_parameters_are_not_compared() -> None:
    found = diagnose(ActorCritic(shared=False), torch.randn(32, 8), step=ppo(value=1e5))
    assert not found.of("loss-parts")


def test_a_metric_among_the_parts_is_a_note() -> None:
    def step(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        logits, values = model(batch)
        target = torch.arange(32) % 4
        fit = functional.cross_entropy(logits, target) + values.square().mean()
        return {"fit": fit, "accuracy": (logits.argmax(1) == target).float().mean()}

    found = diagnose(ActorCritic(), torch.randn(32, 8), step=step)
    assert found.ok
    assert [(f.severity, f.where) for f in found.of("loss-parts")] == [("note", "accuracy")]
