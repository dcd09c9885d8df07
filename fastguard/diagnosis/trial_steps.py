"""`take_steps`: takes a few real steps on one batch and measures the first update."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastguard.checkpoints.random_state import random_state, set_random_state
from fastguard.diagnosis.gradients import gradients_of
from fastguard.diagnosis.replay.losses import total_of
from fastguard.diagnosis.replay.replay import copied
from fastguard.diagnosis.replay.subject import Subject
from fastguard.diagnosis.replay.tensor_range import as_real
from fastguard.functional.clip import clip_grad_norm_

N_STEPS = 5
SECONDS = 8.0
"""No further step starts after this time, so that a diagnosis takes less than half a minute."""


@dataclass(frozen=True, slots=True)
class Update:
    """The effect of the first step on one parameter.

    Attributes:
        weight, moved: Norm of the parameter before the step, and norm of its change.
        stuck: Share of the elements that have a gradient but did not change, bit for bit.
        dtype: Dtype of the parameter.
    """

    weight: float
    moved: float
    stuck: float
    dtype: torch.dtype


@dataclass(slots=True)
class RealSteps:
    """The result of a few real steps.

    Attributes:
        losses: Loss before the first step and after each step.
        updates: Updates by parameter; parameters without a gradient are missing.
        optimizer: Description of the optimizer.
    """

    optimizer: str
    losses: list[float] = field(default_factory=list)
    updates: dict[str, Update] = field(default_factory=dict)


def take_steps(subject: Subject, trained: dict[str, nn.Parameter]) -> RealSteps:
    """Trains on the batch. The caller must restore all state.

    If the subject has no optimizer, AdamW with its defaults is used. Every step uses the same
    random numbers, so that dropout does not hide a falling loss. The optimizer's hooks do not run,
    because they may write logs or averages.
    """
    optimizer = subject.optimizer
    if optimizer is None:
        optimizer = torch.optim.AdamW(trained.values())
        seen = RealSteps("AdamW(lr=0.001), because no optimizer was given")
    else:
        seen = RealSteps(type(optimizer).__name__)
        optimizer._optimizer_step_pre_hooks = OrderedDict()
        optimizer._optimizer_step_post_hooks = OrderedDict()
    rng = random_state()
    evaluated: list[float] = []

    def closure() -> Tensor:
        set_random_state(rng)
        total = _loss(subject)
        evaluated.append(float(total.detach()))
        leaves = list(trained.values())
        gradients = gradients_of(total, leaves)
        for parameter, gradient in zip(leaves, gradients, strict=True):
            parameter.grad = gradient
        if subject.max_norm is not None:
            clip_grad_norm_(leaves, subject.max_norm)
        return total.detach()

    before = {name: p.detach().clone() for name, p in trained.items()}
    start = time.perf_counter()
    for step in range(N_STEPS):
        evaluated.clear()
        # Calls the method of the class, since schedulers wrap `step` on the instance to count
        # calls.
        type(optimizer).step(optimizer, closure)  # type: ignore[arg-type]
        seen.losses.append(evaluated[0])
        if step == 0:
            seen.updates = {
                n: _update(before[n], p) for n, p in trained.items() if p.grad is not None
            }
            before.clear()
        if time.perf_counter() - start > SECONDS:
            break
    set_random_state(rng)
    seen.losses.append(float(_loss(subject).detach()))
    return seen


def _loss(subject: Subject) -> Tensor:
    with subject.autocast:
        total = total_of(subject.step(subject.model, copied(subject.batch)))
    assert total is not None, "steps are taken only when there is a loss"
    return total


@torch.no_grad()
def _update(before: Tensor, parameter: Tensor) -> Update:
    gradient = parameter.grad
    assert gradient is not None
    wanted = as_real(gradient.to_dense() if gradient.is_sparse else gradient) != 0
    old, new = as_real(before), as_real(parameter)
    stuck = (new == old) & wanted
    return Update(
        weight=float(old.double().norm()),
        moved=float((new.double() - old.double()).norm()),
        stuck=float(stuck.sum() / wanted.sum()) if wanted.any() else 0.0,
        dtype=parameter.dtype,
    )
