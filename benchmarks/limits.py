"""Adaptive limits and a fixed limit: norm, limit and loss of a small GPT with gradient spikes.

    python -m benchmarks.limits [OUT.png]

Trains the model of the demo once per rule, with the same weights, batches and spikes, on one CPU
thread, in a minute or two on an idle machine. A spike is noise with thirty times the norm of an
ordinary gradient. The picture illustrates the rules and is not a measurement.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.plots.look import FAINT, INK, QUIET, STYLE
from fastguard import AdaGC, AutoClip, GuardedOptimizer, ZClip
from fastguard.commands.demo.model import GPT
from fastguard.commands.demo.text import load_text
from fastguard.commands.demo.training import Settings, one_thread

STEPS = 200
SPIKES = (80, 81, 82, 130, 131, 160)
SPIKE_NORM = 30.0
SMOOTH = 10  # steps of the moving average
LIMITS = {
    "max_norm=1.0": (1.0, "global"),
    "ZClip": (ZClip(), "global"),
    "AutoClip": (AutoClip(), "global"),
    "AdaGC": (AdaGC(warmup=40), "tensor"),
}
NORM, LIMIT, LOSS = "#9aa5b1", "#d9822b", "#0b7a75"


@dataclass
class Run:
    """The values of each step of a run."""

    norms: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def train(name: str) -> Run:
    """Trains the model of the demo with one of `LIMITS`."""
    settings, text = Settings(steps=STEPS), load_text()
    torch.manual_seed(settings.seed)
    model = GPT(settings.width, settings.layers, settings.heads, settings.context)
    inner = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), fused=True)
    max_norm, scope = LIMITS[name]
    opt = GuardedOptimizer(inner, max_norm=max_norm, clip_scope=scope)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, settings.lr, STEPS, pct_start=0.1, cycle_momentum=False
    )
    batches = text.batches(settings.batch_size, settings.context, settings.seed)
    noise = torch.Generator().manual_seed(1)
    run = Run()
    n = sum(p.numel() for p in model.parameters())
    for step in range(STEPS):
        loss = model.loss(*next(batches))
        opt.zero_grad()
        loss.backward()
        if step in SPIKES:
            for p in model.parameters():
                assert p.grad is not None
                p.grad += torch.randn(p.shape, generator=noise) * (SPIKE_NORM / n**0.5)
        opt.step(loss=loss)
        schedule.step()
        (record,) = opt.records()
        run.norms.append(record.total_norm)
        run.limits.append(record.limit)
        run.losses.append(loss.item())
    return run


def smoothed(values: list[float]) -> list[float]:
    """Returns the mean of the last `SMOOTH` values at each step."""
    windows = (values[max(0, i + 1 - SMOOTH) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(runs: dict[str, Run], path: Path) -> None:
    """Draws a column per run: norm and limit above, and below the losses with both limits."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.2), dpi=130, layout="constrained", facecolor="white")
        rows = figure.subplots(2, len(runs), sharex=True, sharey="row")
        fixed = smoothed(next(iter(runs.values())).losses)
        for column, (name, run) in enumerate(runs.items()):
            top, bottom = rows[0][column], rows[1][column]
            top.set_title(name)
            for axes in (top, bottom):
                axes.grid(True, axis="y")
                for step in SPIKES:
                    axes.axvline(step, color=FAINT, linewidth=0.8, zorder=0.5)
            top.semilogy(run.norms, color=NORM, linewidth=0.8, label="gradient norm")
            top.semilogy(run.limits, color=LIMIT, linewidth=1.6, label="limit")
            bottom.plot(run.losses, color=LOSS, alpha=0.25, linewidth=0.8)
            bottom.plot(smoothed(run.losses), color=LOSS, linewidth=2.0, label="loss")
            if column:
                bottom.plot(fixed, color=INK, linewidth=1.0, linestyle=":", label="fixed limit")
            bottom.set_xlabel("step")
            bottom.set_xlim(0, STEPS)
        rows[0][0].set_ylabel("norm")
        rows[1][0].set_ylabel("loss, nats per byte")
        handles = [*rows[0][1].get_lines()[len(SPIKES) :], *rows[1][1].get_lines()[-2:]]
        labels = ["gradient norm", "limit", "loss, mean of 10 steps", "loss with max_norm=1.0"]
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(
            "The same model, batches and gradient spikes (gray lines) under four limits",
            x=0.01, ha="left", fontsize=12, weight="bold", color=INK,
        )  # fmt: skip
        for axes in rows.flat:
            axes.tick_params(colors=QUIET)
        figure.savefig(path)


def main(path: Path) -> None:
    """Trains all runs and draws them."""
    with one_thread():
        runs = {name: train(name) for name in LIMITS}
    for name, run in runs.items():
        print(f"{name:14} loss of the last {SMOOTH} steps: {smoothed(run.losses)[-1]:.3f}")
    draw(runs, path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/adaptive_limits.png"))
