"""The stages as Triton kernels, with the signatures and results of `fastguard.stages.reference`.

    measure   chunk table -> launch 1 (a second one with several segments)    reads N bytes
    decide    launch 2, one program                                           O(S + K * W)
    apply     chunk table -> launch 3                                         nothing, or 2N bytes
    pack      launch 4, one program: the record of the step                   O(S + K)

Adaptive gradient clipping takes two more launches: see `fastguard.kernels.units`. A watched step
takes more launches, for each result and bucket: see `fastguard.kernels.watch`.

No function here waits for the device.
"""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastguard.gradients.buckets import GradBucket
from fastguard.gradients.unit_buckets import UnitBucket
from fastguard.kernels import units as unit_kernels
from fastguard.kernels import watch as watch_kernels
from fastguard.kernels.apply import apply_chunks
from fastguard.kernels.chunks import ChunkTable, table_of
from fastguard.kernels.decide import decide_step
from fastguard.kernels.measure import measure_chunks
from fastguard.kernels.record import record_step
from fastguard.kernels.tuning import n_programs
from fastguard.kernels.unit_table import unit_table
from fastguard.kernels.upload import Upload, upload
from fastguard.stages.contract import GuardState, Policy, Signals, Verdict
from fastguard.stages.formulas import holds_norms
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.reference_units import summary_of
from fastguard.stages.spike_rules import GRAD_NORM, Rule

RULE_TABLES = 64

_diagnostics = {"copied_gradients": 0}
_rule_tables: dict[tuple, Upload] = {}  # keys: rules, signals, names of losses, device
_lock = threading.Lock()


def diagnostics() -> dict[str, int]:
    """Returns counts of slow operations since the start of the process.

    Returns:
        `copied_gradients`: how often a gradient had to be copied to be measured or changed, because
        its strides leave gaps or it overlaps another gradient.
    """
    return dict(_diagnostics)


def measure_bucket(
    bucket: GradBucket,
    n_segments: int,
    n_tensors: int,
    norm_type: float,
    inv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes power sums and counts: see `fastguard.stages.reference.measure_bucket`."""
    table = table_of(bucket, n_segments, n_programs(bucket.device))
    _copy_in(table, bucket)
    rooted = holds_norms(bucket.dtype, norm_type)
    return measure_chunks(
        table, bucket.device, bucket.dtype, n_segments, n_tensors, norm_type, inv_scale, rooted
    )


def decide(stats: GradStats, signals: Signals, state: GuardState | None, policy: Policy) -> Verdict:
    """Returns the verdict and updates `state`: see `fastguard.stages.decide.decide`."""
    rules = None
    if policy.rules and state is not None:
        names = tuple(signals.loss_names)
        rules = _rule_table(policy.rules, policy.signals, names, stats.summary.device)
    decided, before = decide_step(
        stats.summary.contiguous(),
        stats.norm_type,
        stats.rooted,
        policy.max_norm.contiguous(),
        policy.nonfinite,
        signals.losses.contiguous(),
        signals.inv_scale,
        signals.found_inf,
        rules,
        None if state is None else state.counters,
        None if state is None or rules is None else state.windows,
        None if state is None or rules is None else state.rings,
        signals.given,
        signals.scale_falls,
    )
    if state is not None:
        if state.undo is not None:
            state.undo.append(partial(state.put_back, before))
        written = (state.counters, state.windows, state.rings)
        increment_version(written if rules is not None else written[:1])
    return Verdict(**decided, units=None, clipped_units=())


def _rule_table(
    rules: tuple[Rule, ...],
    signals: tuple[str, ...],
    loss_names: tuple[str, ...],
    device: torch.device,
) -> Tensor:
    """Returns the rules with the columns of `kernels.columns`, float64 `(K, 8)`; uploaded once."""
    key = (rules, signals, loss_names, device)
    table = _rule_tables.get(key)
    if table is None:
        table = upload(_rule_rows(rules, signals, loss_names), device)
        if table.is_lasting:
            with _lock:
                if key not in _rule_tables and len(_rule_tables) >= RULE_TABLES:
                    del _rule_tables[next(iter(_rule_tables))]  # drops the oldest entry
                _rule_tables[key] = table
    table.await_on_stream()
    return table.memory


def _rule_rows(
    rules: tuple[Rule, ...], signals: tuple[str, ...], loss_names: tuple[str, ...]
) -> np.ndarray:
    rows = [
        [
            rule.sigma,
            rule.warmup,
            rule.window,
            rule.fixed,
            rule.action == "skip",
            rule.action == "clip",
            _signal_index(signal, loss_names),
            0.0,
        ]
        for rule, signal in zip(rules, signals, strict=True)
    ]
    return np.array(rows, dtype=np.float64)


def _signal_index(signal: str, loss_names: tuple[str, ...]) -> int:
    if signal == GRAD_NORM:
        return -1
    return loss_names.index(signal) if signal in loss_names else -2


def apply(
    bucket: GradBucket, multiplier: Tensor, clean: Tensor, changes: Tensor | None = None
) -> None:
    """Scales and cleans one bucket in place: see `fastguard.stages.reference.apply`."""
    device = bucket.device
    multiplier = multiplier.contiguous()  # an expanded scalar is not contiguous
    table = table_of(bucket, multiplier.numel(), n_programs(device))
    _copy_in(table, bucket)
    apply_chunks(table, device, bucket.dtype, multiplier, clean, changes)
    for position, buffer in table.copies:
        bucket.grads[position].copy_(buffer)
    # Increments versions, since autograd does not see the writes of a kernel. Gradients of a run
    # share one version counter.
    increment_version(bucket.grads if bucket.runs is None else [run.flat for run in bucket.runs])


def pack(
    row: Tensor,
    stats: GradStats,
    signals: Signals,
    verdict: Verdict,
    state: GuardState,
    lr: Tensor | None,
) -> None:
    """Writes the record of a step into one row: see `fastguard.stages.reference.pack`."""
    record_step(
        row,
        stats.summary.contiguous(),
        stats.counts.contiguous(),
        verdict.clip_coef,
        verdict.found_inf,
        verdict.clean,
        verdict.reason,
        verdict.total_norm,
        state.counters,
        lr,
        signals.losses.contiguous(),
        verdict.spikes,
        verdict.thresholds,
    )


def clip_units(
    units: UnitBucket,
    limits: Tensor,
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None = None,
    skips: Tensor | None = None,
) -> Tensor:
    """Clips the units of one bucket: see `fastguard.stages.reference_units.clip_units`."""
    coefs = unit_coefs(units, limits, norm_type, propagates, inv_scale)
    coefs = coefs if skips is None else torch.where(skips, 1.0, coefs)
    scale_units(units, coefs)
    return summary_of(coefs)


def unit_coefs(
    units: UnitBucket,
    limits: Tensor,
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None = None,
) -> Tensor:
    """Computes the coefficient of each unit: see `fastguard.stages.reference_units.unit_coefs`."""
    bucket = units.bucket
    table = unit_table(units, tuple(limits.tolist()))
    for copies, tensors in (
        (table.grad_copies, bucket.grads),
        (table.weight_copies, units.weights),
    ):
        for position, buffer in copies:
            buffer.copy_(tensors[position])
            _diagnostics["copied_gradients"] += 1
    dtypes = bucket.dtype, units.weights[0].dtype
    return unit_kernels.unit_coefs(table, bucket.device, dtypes, norm_type, propagates, inv_scale)


def scale_units(units: UnitBucket, coefs: Tensor) -> None:
    """Scales each unit in place: see `fastguard.stages.reference_units.scale_units`."""
    bucket = units.bucket
    table = unit_table(units)
    unit_kernels.scale_units(table, bucket.device, bucket.dtype, coefs.contiguous())
    for position, buffer in table.grad_copies:
        bucket.grads[position].copy_(buffer)
    increment_version(bucket.grads)


def read_bits(bucket: GradBucket, n_segments: int, nonzero: bool, checksum: bool) -> Tensor:
    """Reads the bit patterns: see `fastguard.stages.reference_watch.read_bits`."""
    device, item_size = bucket.device, bucket.dtype.itemsize
    table = table_of(bucket, n_segments, n_programs(device))
    _copy_in(table, bucket)
    return watch_kernels.read_bits(table, device, item_size, n_segments, nonzero, checksum)


def count_exponents(bucket: GradBucket, stride: int, inv_scale: Tensor | None = None) -> Tensor:
    """Counts exponents: see `fastguard.stages.reference_watch.count_exponents`."""
    # Reuses the table of `measure` if there is one; the number of segments does not matter here.
    n_segments = next(iter(bucket.memo.tables), 0) or max(bucket.segment_ids) + 1
    table = table_of(bucket, n_segments, n_programs(bucket.device))
    _copy_in(table, bucket)
    return watch_kernels.count_exponents(table, bucket.device, bucket.dtype, stride, inv_scale)


def _copy_in(table: ChunkTable, bucket: GradBucket) -> None:
    for position, buffer in table.copies:
        buffer.copy_(bucket.grads[position])
        _diagnostics["copied_gradients"] += 1
