"""The demo's GPT in bfloat16 with a master trains bitwise like one with float32 weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import fastguard
import fastguard.optim as guarded
from fastguard.commands.demo.model import GPT
from fastguard.commands.demo.text import load_text
from fastguard.commands.demo.training import Settings
from fastguard.optim.orders import Orders
from guardtest.updates import same_bits

SETTINGS = Settings(steps=25)
NAN_STEP = 11


def gpt() -> GPT:
    torch.manual_seed(SETTINGS.seed)
    return GPT(SETTINGS.width, SETTINGS.layers, SETTINGS.heads, SETTINGS.context).bfloat16()


def adamw(parameters: list[Tensor], **options: Any) -> tuple[Any, Any]:
    optimizer = guarded.AdamW(parameters, lr=SETTINGS.lr, reproducible=True, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, SETTINGS.lr, SETTINGS.steps, cycle_momentum=False
    )
    return optimizer, schedule


def batches() -> Any:
    drawn = load_text().batches(4, SETTINGS.context, SETTINGS.seed)
    return (next(drawn) for _ in range(SETTINGS.steps))


def train_guarded(model: GPT, master: str) -> tuple[Any, list[float], list[Any]]:
    """Trains with bfloat16 weights and a guard that clips, and skips the step with a NaN.

    Returns:
        The state of the optimizer, the losses, and the records of the steps.
    """
    optimizer, schedule = adamw(list(model.parameters()), master=master)
    guard = fastguard.GuardedOptimizer(optimizer, max_norm=1.0)
    losses = []
    for step, batch in enumerate(batches()):
        guard.zero_grad()
        loss = model.loss(*batch)
        loss.backward()
        if step == NAN_STEP:
            model.head.weight.grad[3, 17] = math.nan
        guard.step()
        schedule.step()
        losses.append(loss.item())
    records = list(guard.history)
    assert [r.action == "skipped" for r in records] == [i == NAN_STEP for i in range(len(records))]
    assert sum(r.action == "clipped" for r in records) > 10
    return optimizer.state, losses, records


def train_exact(weights: dict[str, Tensor], master: str, records: list[Any]) -> list[float]:
    """Trains float32 weights with the verdicts of another run, and returns the losses.

    Gradients are those of the weights rounded to bfloat16. The norms of bfloat16 gradients and of
    their float32 copies are summed in another order, so the run uses the given verdicts instead of
    computing new ones.
    """
    twin = gpt()  # only its structure is used, not its weights
    optimizer, schedule = adamw(list(weights.values()))
    losses = []
    for record, (inputs, targets) in zip(records, batches(), strict=True):
        halves = {name: rounded(w, master).requires_grad_() for name, w in weights.items()}
        logits = functional_call(twin, halves, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        grads = torch.autograd.grad(loss, list(halves.values()))
        for w, grad in zip(weights.values(), grads, strict=True):
            w.grad = grad.float()
        multiplier = torch.tensor([record.clip_coef], dtype=torch.float64)
        skipped = torch.tensor(float(record.action == "skipped"))
        with optimizer.obeying(Orders(multiplier, skipped, torch.zeros(()))):
            optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def rounded(weight: Tensor, master: str) -> Tensor:
    """Returns a float32 weight in bfloat16, as an optimizer with this master rounds it."""
    weight = weight.detach()
    return guarded.bits.split(weight)[0] if master == "remainder" else weight.bfloat16()


@pytest.mark.parametrize("master", ["remainder", "float32"])
def test_every_weight_equals_that_of_a_float32_run(master):
    model = gpt()
    weights = {n: p.detach().float().requires_grad_() for n, p in model.named_parameters()}
    state, ours, records = train_guarded(model, master)
    assert train_exact(weights, master, records) == ours
    assert ours[-1] < 0.8 * ours[0]  # the run does train
    for p, w in zip(model.parameters(), weights.values(), strict=True):
        assert same_bits(p.detach(), rounded(w, master))
        whole = (
            guarded.bits.from_remainder(p.detach(), state[p]["remainder"])
            if master == "remainder"
            else state[p]["master"]
        )
        assert same_bits(whole, w.detach())
