"""Whole training steps of GPT-2 124M, unguarded and guarded: the cost that a user sees.

python -m benchmarks.training_step --out FILE
python -m benchmarks.training_step --device cpu --quick      # a trial of this script

A step has a forward and a backward pass over 8 x 1024 tokens in bf16 autocast, and fused AdamW. It
is measured in eager mode, then compiled. All variants share one model, one optimizer and one batch,
and alternate in every round. A sample is `STEPS` consecutive steps from an idle device to an idle
device, so that a sync lets the device run out of work, as in training. The added time is relative
to the bare step of the same round. The learning rate is tiny, so the weights hardly change.

The file is written after each mode. The exit status is 1 if a mode failed.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fastguard
from benchmarks.script import commit, options
from benchmarks.syncs import waits_of
from fastguard.commands.bench.machine import describe_machine, title_of, versions
from fastguard.commands.bench.results import write
from fastguard.commands.bench.runner import Spread, rounds
from fastguard.commands.bench.selection import USUAL_STEP
from fastguard.commands.bench.steps import (
    LR,
    clip_and_step,
    clip_and_step_if_all_is_finite,
    clip_and_step_if_norm_is_finite,
)
from fastguard.commands.demo.model import GPT
from fastguard.commands.terminal import incidents_unlogged

MODES = ("eager", "compiled")
BARE = "bare step"
MAX_NORM = 1.0
STEPS = 5  # steps per sample
WARM_UP = 3


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    context: int = 1024
    vocabulary: int = 50304  # GPT-2's vocabulary of 50257, padded for tensor cores
    batch: int = 8

    def model(self) -> GPT:
        """Creates the model."""
        return GPT(
            self.width,
            self.layers,
            self.heads,
            self.context,
            vocabulary=self.vocabulary,
            bias=True,
            tied=True,
        )


TINY = Size(width=32, layers=2, heads=2, context=16, vocabulary=64, batch=2)

Step = Callable[[], None]


def ways_to_step(
    model: torch.nn.Module, inner: torch.optim.Optimizer
) -> dict[str, Callable[[Tensor], object]]:
    """Returns the variants of the code after the backward pass; each takes the loss."""
    parameters = list(model.parameters())
    guarded = fastguard.GuardedOptimizer(inner, max_norm=MAX_NORM)
    clipped = (inner, parameters, MAX_NORM)

    def isfinite_clip(loss: Tensor) -> None:
        grads = (p.grad for p in parameters if p.grad is not None)
        clip_and_step_if_all_is_finite(inner, parameters, grads, MAX_NORM)

    return {
        BARE: lambda loss: inner.step(),
        "clip + step": lambda loss: clip_and_step(*clipped),
        USUAL_STEP: lambda loss: clip_and_step_if_norm_is_finite(*clipped),
        "isfinite + clip + step": isfinite_clip,
        "GuardedOptimizer": lambda loss: guarded.step(loss=loss),
    }


def training_steps(size: Size, device: torch.device, mode: str) -> dict[str, Step]:
    """Returns the whole training step of each variant, with one model."""
    torch.manual_seed(0)
    model = size.model().to(device)
    inner = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    tokens = torch.randint(size.vocabulary, (size.batch, size.context + 1), device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    forward = torch.compile(model.loss) if mode == "compiled" else model.loss

    def whole(end: Callable[[Tensor], object]) -> Step:
        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(inputs, targets)
            loss.backward()
            end(loss)
            inner.zero_grad()

        return step

    return {name: whole(end) for name, end in ways_to_step(model, inner).items()}


def measured(size: Size, device: torch.device, mode: str, seconds: float) -> list[dict[str, Any]]:
    """Measures one row per variant: ms per step, added time, syncs, peak memory."""
    gc.collect()  # frees the model of the previous mode, which is in reference cycles
    steps = training_steps(size, device, mode)
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for order in rounds(steps, seconds):
        for name in order:
            samples[name].append(ms_a_step(steps[name], device))
    bare = samples[BARE]
    return [
        {
            "mode": mode,
            "way": name,
            "rounds": len(ms),
            "ms": asdict(Spread.of(ms)),
            "added_percent": asdict(
                Spread.of([100.0 * (m / b - 1.0) for m, b in zip(ms, bare, strict=True)])
            ),
            "waits": len(waits_of(steps[name], device)) if device.type == "cuda" else None,
            "peak_mb": peak_mb(steps[name], device),
        }
        for name, ms in samples.items()
    ]


def ms_a_step(step: Step, device: torch.device) -> float:
    """Returns the milliseconds per step of `STEPS` consecutive steps, until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3 / STEPS


def peak_mb(step: Step, device: torch.device) -> float | None:
    """Returns the peak GPU memory of a step, including model and optimizer, in 1e6 bytes."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e6


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the rows as a Markdown table."""
    lines = [
        "| mode | after the backward pass | ms per step | added p50 [p20..p80] | waits | peak MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        added = row["added_percent"]
        spread = f"{added['p50']:+.1f} % [{added['p20']:+.1f}..{added['p80']:+.1f}]"
        waits = "-" if row["waits"] is None else row["waits"]
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        cells = (row["mode"], row["way"], f"{row['ms']['p50']:.2f}", spread, waits, peak)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = options(
        "training_step",
        __doc__,
        quick="a tiny model and few rounds",
        seconds=15.0,
        what="per mode ",
    )
    if args is None:
        return 2
    device = args.device
    size, seconds = (TINY, 0.0) if args.quick else (Size(), args.seconds)
    machine = describe_machine(device)
    document = {"machine": machine, "versions": versions(), "commit": commit()}
    document |= {"size": asdict(size), "steps_a_sample": STEPS, "rows": [], "failures": {}}
    for mode in MODES:
        try:
            with incidents_unlogged():
                document["rows"] += measured(size, device, mode, seconds)
        except Exception as error:  # the error is reported, and the other mode still runs
            document["failures"][mode] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        if args.out:
            write(document, args.out)
    print(f"GPT-2 training steps on {title_of(machine)}")
    print("\n".join(table(document["rows"])))
    return 1 if document["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
