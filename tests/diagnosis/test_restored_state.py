"""A diagnosis restores all state bit for bit, whatever it finds."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastguard import ActivationGuard, GuardedOptimizer, diagnose
from guardtest.training import same_bits


class Rich(nn.Module):
    """Changes everything that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.5)
        )
        self.frozen = nn.Linear(16, 16).requires_grad_(False).eval()
        self.head = nn.Linear(16, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.history: list[float] = [1.0]
        self.cache: dict[str, Tensor] = {}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x += 1  # writes into its input
        out = self.head(self.frozen(self.layers(x)))
        self.history.append(float(out.detach().mean()))
        self.cache["out"] = out
        self.last = out
        random.random(), np.random.rand(), torch.rand(1)
        return out


def everything(model: Rich, optimizer: torch.optim.Optimizer, batch: Any) -> dict[str, Any]:
    """The values and identities of all state."""
    state: dict[str, Any] = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"{name} is"] = id(parameter)
        state[f"{name}.grad is"] = id(parameter.grad)
        state[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
        state[f"{name}.requires_grad"] = parameter.requires_grad
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}.{key} is"] = id(value)
            state[f"{name}.{key}"] = value.clone() if isinstance(value, Tensor) else value
    for name, module in model.named_modules():
        state[f"{name}.training"] = module.training
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            state[f"{name}.{table}"] = str(module.__dict__[table])
    state["history"], state["cache"], state["last"] = list(model.history), str(model.cache), None
    state["last"] = model.last
    for i, group in enumerate(optimizer.param_groups):
        state[f"group {i}"] = {k: str(v) for k, v in group.items() if k != "params"}
        state[f"group {i}.params"] = [id(p) for p in group["params"]]
    state["optimizer"] = sorted(optimizer.__dict__)
    state["hooks"] = str(optimizer._optimizer_step_post_hooks)
    state["batch"] = [t.clone() for t in batch]
    state["rng"] = [torch.get_rng_state(), str(random.getstate()), str(np.random.get_state()[1])]
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before) == list(after)
    assert [key for key in before if not same_bits(before[key], after[key])] == []


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output, target)


def raising(output: Tensor, target: Tensor) -> Tensor:
    raise RuntimeError("no loss")


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("loss_fn", [mean_square, raising])
@pytest.mark.parametrize("poison", [None, "input", "weight"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, max_iter=2),
    ],
    ids=["AdamW-tensor-lr", "SGD", "LBFGS"],
)
def test_all_state_is_restored(make, poison, loss_fn, used) -> None:
    model = Rich()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(1))
    batch = (torch.randn(8, 4), torch.randn(8, 1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    if used:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mean_square(model(batch[0].clone()), batch[1])
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    with torch.no_grad():
        if poison == "input":
            batch[0][0, 0] = math.nan
        elif poison == "weight":
            model.head.weight[0, 0] = math.nan
    stepped.clear()
    before = everything(model, optimizer, batch)

    found = diagnose(
        model, batch, loss_fn, optimizer, autocast=torch.autocast("cpu", torch.bfloat16)
    )

    assert_same(before, everything(model, optimizer, batch))
    assert stepped == []
    assert bool(found.errors) == (poison is not None or loss_fn is raising)


def test_guards_do_not_count_the_steps_of_a_diagnosis() -> None:
    """Neither the counters and records of the optimizer nor the activation counts change."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters()), max_norm=1.0)
    guard = ActivationGuard(model, limit=1e-3)
    batch = (torch.randn(8, 4), torch.randn(8, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}

    found = diagnose(model, batch, mean_square, optimizer)

    assert "5 steps of AdamW" in str(found)
    assert optimizer.applied_steps == 0 and optimizer.records() == [] and not optimizer.state
    assert not any(any(counts) for counts in guard.counts().values())
    assert all(same_bits(before[k], v) for k, v in model.state_dict().items())


def test_parameters_held_only_by_the_optimizer_are_restored() -> None:
    model, latents = nn.Linear(4, 1), nn.Parameter(torch.randn(8, 4))
    optimizer = torch.optim.AdamW([*model.parameters(), latents])
    latents.grad = torch.ones(8, 4)
    before, gradient = latents.detach().clone(), latents.grad
    diagnose(model, (torch.randn(8, 4), torch.randn(8, 1)), mean_square, optimizer)
    assert same_bits(latents, before) and latents.grad is gradient


def test_all_state_is_restored_after_an_interruption() -> None:
    model = nn.Linear(4, 1)
    before = model.weight.detach().clone()
    calls = []

    def interrupted(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 6:  # during the real steps
            raise KeyboardInterrupt
        return mean_square(output, target)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, (torch.randn(8, 4), torch.randn(8, 1)), interrupted, optimizer)
    assert same_bits(model.weight, before) and model.weight.grad is None
