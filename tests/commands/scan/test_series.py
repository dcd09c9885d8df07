"""Losses and gradient norms are judged as a guard would have judged them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastguard
from fastguard.commands.scan.columns import is_grad_norm, is_loss
from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.series import KEPT, POINTS, RULE, AllSeries, Growth, Series


def judged(values: list[float], name: str = "loss") -> Series:
    series = Series(name)
    for step, value in enumerate(values, 1):
        if math.isfinite(value):
            series.take(step, Place(step=step), value)
    return series


def skipped_by_a_guard(losses: list[float]) -> list[int]:
    """The steps that a real guard with the same rule skips for these losses."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    guard = fastguard.GuardedOptimizer(torch.optim.SGD([parameter], lr=0.1), spike={"loss": RULE})
    for loss in losses:
        parameter.grad = torch.ones(1)
        guard.step(loss=torch.tensor(loss, dtype=torch.float64))
    return [r.step for r in guard.records() if r.reason == "loss_spike"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 120), st.sampled_from([0.0, 0.05, 0.5]))
def test_spikes_match_those_of_a_guard(seed: int, n: int, share: float) -> None:
    r = random.Random(seed)
    losses = [(100.0 if r.random() < share else 1.0) * math.exp(r.gauss(0, 0.1)) for _ in range(n)]
    assert [s.place.step for s in judged(losses).spikes] == skipped_by_a_guard(losses)


def test_lasting_shift_becomes_the_new_level() -> None:
    losses = [1.0 + 0.01 * (i % 3) for i in range(40)] + [50.0] * 80 + [1.0] * 10
    spikes = judged(losses)
    assert [s.place.step for s in spikes.spikes] == skipped_by_a_guard(losses)
    assert 0 < spikes.n_spikes < 80


def noise(n: int, level, scale: float = 0.05, seed: int = 0) -> list[float]:
    r = random.Random(seed)
    return [level(i) * math.exp(r.gauss(0, scale)) for i in range(n)]


@pytest.mark.parametrize(
    "values, since",
    [
        (noise(60, lambda i: 2 * math.exp(-min(i, 30) / 10) + 0.2 * max(0, i - 30)), (25, 35)),
        (noise(400, lambda i: 1.0 if i < 200 else 1.02 ** (i - 200)), (1, 215)),
        (noise(100, lambda i: 3 * math.exp(-i / 9) + 0.5 if i < 50 else 8.0), (30, 51)),
        ([0.3 + 0.01 * i for i in range(30)], (1, 2)),
        (noise(6144, lambda i: 1 + abs(i - 2000) / 1000, 0.2), (1300, 2700)),
    ],
    ids=["after-a-fall", "exponential", "jump-that-stays", "from-the-start", "downsampled"],
)
def test_growth_reports_where_it_began(values: list[float], since: tuple[int, int]) -> None:
    growth = judged(values).growth()
    assert growth is not None and growth.end > growth.low
    assert since[0] <= growth.line <= since[1]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scale", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("n", [13, 40, 300, 3000])
def test_healthy_runs_show_no_growth(n: int, scale: float, seed: int) -> None:
    falling = noise(n, lambda i: 2 * math.exp(-4 * i / n) + 0.5, scale, seed)
    assert judged(falling).growth() is None
    assert judged([3.0] * n).growth() is None
    spike = [*falling[: n // 2], 1e4, *falling[n // 2 :]]
    assert judged(spike).growth() is None


def test_only_losses_are_checked_for_growth() -> None:
    assert judged([1.1**i for i in range(40)], "grad_norm").growth() is None


def test_the_memory_of_a_series_is_bounded() -> None:
    series = judged([1000.0 if i % 50 == 49 else 1.0 + i % 3 for i in range(50 * 3 * KEPT)])
    assert series.n_spikes == 3 * KEPT and len(series.spikes) == KEPT
    assert len(series._points) < 2 * POINTS


def test_zero_gradient_norms_do_not_enter_the_window() -> None:
    # The warm-up of 8 values is not over.
    assert judged([1.0, 0.0] * 4 + [1.5], "grad_norm").n_spikes == 0
    assert judged([1.0, 0.0] * 8 + [1.5], "grad_norm").n_spikes == 1


@pytest.mark.parametrize("name", ["loss", "train/loss", "Train Loss", "val_loss_epoch", "nll"])
def test_losses(name: str) -> None:
    assert is_loss(name) and AllSeries().judges(name)


@pytest.mark.parametrize("name", ["grad_norm", "train/grad_norm", "gnorm", "Gradient Norm"])
def test_gradient_norms(name: str) -> None:
    assert is_grad_norm(name) and AllSeries().judges(name)


@pytest.mark.parametrize(
    "name", ["lr", "loss_scale", "best_loss", "weight_norm", "run - loss__MIN"]
)
def test_other_series(name: str) -> None:
    assert not AllSeries().judges(name)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("kind", ["noise", "growth", "spikes", "zeros"])
def test_take_all_equals_repeated_take(name: str, kind: str) -> None:
    rng = random.Random(3)
    values = [rng.gauss(2, 0.2) for _ in range(10_000)]
    if kind == "growth":
        values = [value + 0.001 * i for i, value in enumerate(values)]
    if kind == "spikes":
        values = [value * rng.choice([1] * 30 + [1, 40, 900]) for value in values]
    if kind == "zeros":
        values = [value if rng.random() < 0.9 else 0.0 for value in values]
    one, together = Series(name), Series(name)
    for i, value in enumerate(values):
        one.take(i, Place(step=i), value)
    at = 0
    while at < len(values):
        part = values[at : at + rng.choice([1, 5, 40, 300, 3000])]
        lines = range(at, at + len(part))
        together.take_all(lines, lambda i, lines=lines: Place(step=lines[i]), part)
        at += len(part)
    assert one == together and (kind != "spikes" or one.n_spikes > 100)


def judged_together(name: str, values: np.ndarray) -> tuple[Series, Growth | None]:
    series = Series(name)
    for i in range(0, len(values), 4096):
        part = values[i : i + 4096].tolist()
        series.take_all(range(i, i + len(part)), lambda k, i=i: Place(step=i + k), part)
    return series, series.growth()


N = 200_000
T = np.arange(N) / N


def gaussian(scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(4).standard_normal(N)


FALLING = (2 + 6 * np.exp(-30 * T)) * (1 + gaussian(0.05))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("loss", FALLING),
        ("loss", 0.05 + 8 * (np.arange(N) + 10.0) ** -0.4 * np.exp(gaussian(0.2))),
        ("loss", 2 + 0.5 * np.cos(10 * np.pi * T) * np.exp(-T) + gaussian(0.02)),
        ("loss", np.where(T < 0.4, 4, 4 - 2 * np.clip(20 * T - 8, 0, 1)) + gaussian(0.1)),
        ("loss", 10 - 9 * np.clip(50 * T, 0, 1) + gaussian(0.1)),
        ("val_loss", 1 + np.exp(-20 * T) + 0.15 * T + gaussian(0.02)),
        ("loss", 5 + np.cumsum(gaussian(0.03)) / np.sqrt(N)),
        ("grad_norm", np.exp(gaussian())),
        ("grad_norm", np.abs(np.random.default_rng(4).standard_t(3, N))),
        ("grad_norm", np.random.default_rng(4).pareto(3, N) + 1),
    ],
    ids="falling power oscillating plateau warmup overfit walk lognormal t pareto".split(),
)
def test_noise_of_a_long_series_raises_no_alarm(name: str, values: np.ndarray) -> None:
    series, growth = judged_together(name, values)
    assert growth is None and not series.alarms


@pytest.mark.parametrize("at", [N // 3, N - 40])
@pytest.mark.parametrize("heavy", [False, True])
def test_real_spike_in_a_long_series_raises_an_alarm(at: int, heavy: bool) -> None:
    values = np.exp(gaussian()) if heavy else FALLING.copy()
    values[at] = 1e4 if heavy else 30
    series, growth = judged_together("grad_norm" if heavy else "loss", values)
    assert series.alarms and growth is None
    assert series.largest is not None and series.largest.place.step == at


@pytest.mark.parametrize("last", [1000, N // 100, N // 20, N // 5, N // 2])
def test_late_divergence_of_a_long_series_is_growth(last: int) -> None:
    values = FALLING.copy()
    values[-last:] += np.linspace(0, 20, last)
    _, growth = judged_together("loss", values)
    assert growth is not None and growth.end > 10
    assert growth.place.step is not None and growth.place.step <= N - last // 2


@pytest.mark.parametrize("n", [200, 500, 2000])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_heavy_tailed_noise_of_a_short_series_rarely_raises_an_alarm(n: int, name: str) -> None:
    values = np.exp(0.4 * np.random.default_rng(3).standard_normal((40, n)))
    judged = [judged_together(name, one)[0] for one in values]
    assert sum(series.n_spikes > 0 for series in judged) >= 10
    assert sum(series.alarms for series in judged) <= 3
    values[:, n // 2] = 30
    assert all(judged_together(name, one)[0].alarms for one in values)


@pytest.mark.parametrize("after", [[1e-4, 2e-4], [1e-4, 0.0, 3e-4, 1e-5]])
def test_the_first_values_after_zeros_raise_no_alarm(after: list[float]) -> None:
    series, growth = judged_together("loss", np.array([0.0] * 40 + after * 20))
    assert series.n_spikes and not series.alarms and growth is None


@pytest.mark.parametrize(("name", "grows"), [("loss", True), ("critic_loss", False)])
def test_the_loss_of_a_critic_may_grow(name: str, grows: bool) -> None:
    _, growth = judged_together(name, np.concatenate([np.ones(30), np.linspace(1, 5, 60)]))
    assert (growth is not None) == grows
