"""Runs all contenders of a case in turn, round by round, and computes ratios within each round.

A shared machine changes speed within seconds. Contenders that alternate see the same conditions, so
the ratios within a round are stable even if the times are not. Gradients that a contender changes
are restored before each call, so that every measured call does the full work.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fastguard.commands.bench.clock import Clock, Sample
from fastguard.commands.bench.contenders import CONTENDERS, Prepared, Unavailable
from fastguard.commands.bench.machine import Ceilings, Evictor, available_bytes
from fastguard.commands.bench.steps import STEPS, inner_optimizer
from fastguard.commands.bench.workload import Case, Workload, bytes_needed

MIN_ROUNDS, MAX_ROUNDS = 5, 101
OURS = ("fastguard", "GuardedOptimizer")
SHORTEST_MS = 0.3  # on a CPU, calls shorter than this are repeated within a sample


@dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentiles."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Computes the percentiles of some values."""
        return cls(*(float(v) for v in np.percentile(values, (20, 50, 80))))


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        case: Id of the case; name, dtype, situation, optimizer, cold and series are its parts.
        contender, baseline: The measured contender, and the contender that it is compared with.
        rounds: Number of rounds.
        ms: Time of a call until its result is available.
        host_ms, device_ms: Host and device time; equal to `ms` on a CPU.
        ratio: Baseline time divided by contender time, per round: above 1 is faster.
        limit_percent: The minimum time to move the bytes of the case, as a percentage of the median
            of `device_ms`.
        norm_error: Relative error of the returned norm against float64; `inf` if the norm is
            infinite or NaN, None if none was returned.
    """

    case: str
    name: str
    dtype: str
    situation: str
    optimizer: str | None
    cold: bool
    series: str | None
    segments: int
    tensors: int
    elements: int
    grad_bytes: int
    io: str
    contender: str
    baseline: str
    rounds: int
    ms: Spread
    host_ms: Spread
    device_ms: Spread
    ratio: Spread
    limit_percent: float
    norm_error: float | None

    def as_dict(self) -> dict[str, Any]:
        """Returns the row as nested dicts, for JSON."""
        return asdict(self)


def run_case(
    case: Case,
    device: torch.device,
    limit: Ceilings,
    *,
    seconds: float = 2.0,
    on_round: Callable[[], None] | None = None,
) -> tuple[list[Row], dict[str, str]]:
    """Measures every contender of a case.

    Args:
        case: The case.
        device: The device.
        limit: The ceilings of this machine.
        seconds: Approximate duration; at least 5 rounds are run.
        on_round: Called after every round, for progress.

    Returns:
        One row per contender that could run, and `{contender: reason}` for all other contenders.
    """
    needed, usable = bytes_needed(case), 0.8 * available_bytes(device)
    if needed > usable:
        reason = f"needs {needed / 1e9:.1f} GB of memory, but may use only {usable / 1e9:.1f} GB"
        return [], dict.fromkeys(case.contenders, reason)
    with torch.no_grad():
        work = Workload(case, device)
        contenders, left_out = prepare(work)
        errors = {}
        for name, prepared in list(contenders.items()):
            try:
                errors[name] = warm_up(prepared, work)
            except Exception as error:  # some contenders raise an error for a dtype
                if name.startswith(OURS):
                    raise
                left_out[name] = f"{type(error).__name__}: {error}"
                del contenders[name]
                work.restore()
        if case.baseline not in contenders:
            return [], left_out
        samples = interleave(contenders, work, seconds=seconds, on_round=on_round)
    rows = [
        summarize(case, name, samples[name], samples[case.baseline], limit, errors[name])
        for name in contenders
    ]
    return rows, left_out


def prepare(work: Workload) -> tuple[dict[str, Prepared], dict[str, str]]:
    """The contenders of a case that can run, and why each other contender cannot."""
    inner = None
    if work.case.optimizer is not None:
        inner = inner_optimizer(work, work.parameters)
    contenders, left_out = {}, {}
    for name in work.case.contenders:
        try:
            if inner is None:
                contenders[name] = CONTENDERS[name](work)
            else:
                contenders[name] = STEPS[name](work, inner)
        except Unavailable as reason:
            left_out[name] = str(reason)
    return contenders, left_out


def warm_up(prepared: Prepared, work: Workload) -> float | None:
    """Calls a contender twice; returns the relative error of its first norm."""
    norm = prepared.call()
    error = None
    if norm is not None and work.true_norm:
        error = relative_error(norm, work.true_norm)
    prepared.restore()
    prepared.call()
    prepared.restore()
    return error


def relative_error(norm: torch.Tensor, truth: float) -> float:
    """`|norm / truth - 1|`; `inf` for a non-finite norm."""
    error = abs(float(norm.double()) / truth - 1.0)
    return error if math.isfinite(error) else math.inf


def interleave(
    contenders: dict[str, Prepared],
    work: Workload,
    *,
    seconds: float,
    on_round: Callable[[], None] | None = None,
) -> dict[str, list[Sample]]:
    """Runs rounds with one sample per contender, each round starting with the next contender."""
    clock = Clock(work.device)
    cold = work.case.cold or work.device.type == "cuda"
    evict = Evictor(work.device) if cold else None
    # Wakes the CPU threads, which sleep after a serial copy but are awake after a backward pass.
    awake = torch.ones(2**18, device=work.device)
    preparations = {
        name: _preparation(prepared, evict or awake.sum) for name, prepared in contenders.items()
    }
    repeats = {
        name: 1 if cold or work.case.changes_grads else _repeats(clock, prepared)
        for name, prepared in contenders.items()
    }
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    gc_was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for order in rounds(contenders, seconds):
            for name in order:
                call = contenders[name].call
                sample = clock.sample(call, preparations[name], repeat=repeats[name])
                samples[name].append(sample)
            if on_round:
                on_round()
    finally:
        if gc_was_on:
            gc.enable()
    return samples


def rounds(names: Iterable[str], seconds: float) -> Iterator[list[str]]:
    """Yields the order of each round, rotated by one each time, for about `seconds`."""
    order = list(names)
    stop = time.perf_counter() + seconds
    for n in range(MAX_ROUNDS):
        if n >= MIN_ROUNDS and time.perf_counter() > stop:
            return
        yield order
        order = [*order[1:], order[0]]


def summarize(
    case: Case,
    contender: str,
    samples: list[Sample],
    baseline: list[Sample],
    limit: Ceilings,
    norm_error: float | None,
) -> Row:
    """Summarizes the rounds as a row."""
    ratios = [b.wall_ms / s.wall_ms for s, b in zip(samples, baseline, strict=True)]
    device = Spread.of([s.device_ms for s in samples])
    least_ms = case.io.seconds(limit.read_gb_s, limit.update_gb_s) * 1e3
    return Row(
        case=case.id,
        name=case.name,
        dtype=case.dtype,
        situation=case.situation,
        optimizer=" ".join(case.optimizer) if case.optimizer else None,
        cold=case.cold,
        series=case.series,
        segments=case.segments,
        tensors=len(case.shapes),
        elements=case.elements,
        grad_bytes=case.grad_bytes,
        io=case.io.text,
        contender=contender,
        baseline=case.baseline,
        rounds=len(samples),
        ms=Spread.of([s.wall_ms for s in samples]),
        host_ms=Spread.of([s.host_ms for s in samples]),
        device_ms=device,
        ratio=Spread.of(ratios),
        limit_percent=100.0 * least_ms / device.p50,
        norm_error=norm_error,
    )


def _preparation(prepared: Prepared, last: Callable[[], object]) -> Callable[[], None]:
    def prepare() -> None:
        prepared.restore()
        last()

    return prepare


def _repeats(clock: Clock, prepared: Prepared) -> int:
    took = clock.sample(prepared.call).wall_ms
    if took < SHORTEST_MS:
        took = min(clock.sample(prepared.call).wall_ms for _ in range(5))
    return max(1, min(100, int(SHORTEST_MS / max(took, 1e-3))))
