"""The three step methods that the demo compares, and their shared training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastguard import GuardedOptimizer, SpikeRule, StepRecord
from fastguard.commands.demo.faults import Fault
from fastguard.commands.demo.model import GPT
from fastguard.commands.demo.shards import Shards, norm_as_float
from fastguard.commands.demo.text import Text


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings shared by the three runs; the defaults take about 14 s per run on one core."""

    steps: int = 400
    seed: int = 0
    width: int = 96
    layers: int = 2
    heads: int = 4
    context: int = 64
    batch_size: int = 16
    lr: float = 3e-3
    max_norm: float = 1.0
    validation_windows: int = 256

    @property
    def spike_rule(self) -> SpikeRule:
        """The spike rule: six sigma over 128 norms, with a shorter warm-up in short runs."""
        return SpikeRule(window=128, sigma=6.0, warmup=max(2, min(64, self.steps // 5)))


class Bare:
    """Unmodified PyTorch."""

    name = "bare PyTorch"

    def __init__(self, model: GPT, settings: Settings) -> None:
        self.parameters: list[torch.nn.Parameter] = list(model.parameters())
        self.max_norm: float = settings.max_norm
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.records: list[StepRecord] = []
        self.settings: str = ""

    def step(self, loss: Tensor, batch: int) -> float:
        """Takes one step; returns the gradient norm."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = norm_as_float(torch.nn.utils.get_total_norm(gradients))  # for the plot
        self.optimizer.step()
        return norm


class Clipped(Bare):
    """PyTorch with `clip_grad_norm_`."""

    name = "clip_grad_norm_"

    def step(self, loss: Tensor, batch: int) -> float:
        """Clips and takes one step; returns the gradient norm before clipping."""
        norm = norm_as_float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm))
        self.optimizer.step()
        return norm


class Guarded(Bare):
    """The same optimizer, wrapped by fastguard."""

    name = "fastguard"

    def __init__(self, model: GPT, settings: Settings) -> None:
        super().__init__(model, settings)
        self.guard: GuardedOptimizer = GuardedOptimizer(
            self.optimizer,
            max_norm=settings.max_norm,
            named_parameters=model.named_parameters(),
            spike={"grad_norm": settings.spike_rule},
        )
        self.settings: str = self.guard.describe()
        self.optimizer: torch.optim.Optimizer = self.guard

    def step(self, loss: Tensor, batch: int) -> float:
        """Takes one guarded step; returns the norm of the finite gradient elements."""
        self.guard.step(loss=loss, tag={"batch": batch})
        self.records.extend(self.guard.records())
        return self.records[-1].total_norm


WAYS = (Bare, Clipped, Guarded)


@dataclass(slots=True)
class Run:
    """The results of one run.

    Attributes:
        name: Name of the step method.
        losses: Training loss of each step, in nats per byte.
        norms: Gradient norm of each step; in the guarded run, over the finite elements.
        validation: Loss on held-out text after the last step.
        destroyed_at: The step that made a weight NaN or Inf, or None.
        records: One record per step of the guarded run; empty for the other runs.
        settings: The settings of the guard; empty for the other runs.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation: float = math.nan
    destroyed_at: int | None = None
    records: list[StepRecord] = field(default_factory=list)
    settings: str = ""

    @property
    def skipped(self) -> int:
        return sum(record.action == "skipped" for record in self.records)

    @property
    def applied(self) -> int:
        return len(self.losses) - self.skipped


def train(
    way: type[Bare],
    settings: Settings,
    text: Text,
    faults: Sequence[Fault] = (),
    on_step: Callable[[Run], None] = lambda run: None,
    shards: Shards = Shards(),  # noqa: B008  (frozen)
) -> Run:
    """Trains a new model. Initial weights, batches and faults do not depend on the step method.

    Args:
        way: The step method: `Bare`, `Clipped` or `Guarded`.
        settings: Sizes, steps, seed.
        text: Training and validation text.
        faults: Faults to inject.
        on_step: Called with the run after each step.
        shards: The processes that train together.

    Returns:
        The run; bitwise reproducible, and identical on all processes.
    """
    torch.manual_seed(settings.seed)
    model = GPT(settings.width, settings.layers, settings.heads, settings.context)
    shards.shard_(model)
    stepper = way(model, settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        stepper.optimizer, settings.lr, settings.steps, pct_start=0.1, cycle_momentum=False
    )
    batches = text.batches(settings.batch_size, settings.context, settings.seed)
    fault_at = {fault.step: fault for fault in faults}
    run = Run(way.name, records=stepper.records, settings=stepper.settings)

    for step in range(1, settings.steps + 1):
        fault = fault_at.get(step)
        inputs, targets = shards.part(next(batches))
        loss = model.loss(inputs, targets)
        if fault and shards.has_faults:
            loss = fault.corrupt_loss(loss)
        stepper.optimizer.zero_grad()
        loss.backward()
        if fault:
            fault.corrupt_gradients(model, shards.has_faults)

        run.norms.append(stepper.step(loss, batch=step))
        schedule.step()

        run.losses.append(shards.mean(loss))
        if run.destroyed_at is None and not shards.all_finite(model):
            run.destroyed_at = step
        on_step(run)

    with torch.no_grad():
        held_out = text.held_out(settings.validation_windows, settings.context)
        run.validation = model.loss(*held_out).item()
    return run


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread.

    For a model this small, a second thread is a quarter faster on an idle machine but ten times
    slower on a busy one. With one thread, results are bitwise equal for any number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
