"""Further contenders for the suite; `CONTENDERS` also lists the contenders of `fastguard bench`."""

from __future__ import annotations

import torch
from torch import Tensor

import fastguard
from fastguard.commands.bench.contenders import (
    CONTENDERS,
    Prepared,
    finite_only,
    mode_of,
    on_parameters,
    torch_clip,
)
from fastguard.commands.bench.workload import Workload
from fastguard.gradients.buckets import bucketize
from fastguard.stages.measure import measure

READ_PASS = "fastguard read pass"


def torch_for_loop(work: Workload) -> Prepared:
    """`torch.nn.utils.clip_grad_norm_(foreach=False)`."""
    finite_only(work)
    return on_parameters(work, lambda: torch_clip(work.parameters, work.max_norm, foreach=False))


def torch_compiled(work: Workload) -> Prepared:
    """`torch.nn.utils.clip_grad_norm_` under `torch.compile`."""
    finite_only(work)
    compiled = torch.compile(torch_clip)
    return on_parameters(work, lambda: compiled(work.parameters, work.max_norm))


def fastguard_compiled(work: Workload) -> Prepared:
    """`fastguard.clip_grad_norm_` under `torch.compile`."""
    mode = mode_of(work)
    compiled = torch.compile(fastguard.clip_grad_norm_, fullgraph=True)
    return on_parameters(work, lambda: compiled(work.parameters, work.max_norm, nonfinite=mode))


def measure_segments(work: Workload) -> Prepared:
    """Only the stage that measures, with the parameters distributed over segments."""
    segments, count = work.segment_ids, work.case.segments

    def call() -> Tensor:
        return measure(bucketize(work.grads, segments=segments, n_segments=count), 2.0).total_norm

    return on_parameters(work, call)


def measure_segments_flat(work: Workload) -> Prepared:
    """`FlatGradBuckets.measure`, with the parameters distributed over segments."""
    twin = work.twin()
    segments, count = work.segment_ids, work.case.segments
    flat = fastguard.FlatGradBuckets(twin, segments=segments, n_segments=count)
    return Prepared(lambda: flat.measure().total_norm, lambda: None, twin)


def read_pass(work: Workload) -> Prepared:
    """One pass over existing buckets, for comparison with the read bandwidth."""
    buckets = bucketize(work.grads)

    def call() -> None:
        measure(buckets)

    return Prepared(call, work.restore, work.parameters)


CONTENDERS.update(
    {
        "torch for-loop": torch_for_loop,
        "torch compiled": torch_compiled,
        READ_PASS: read_pass,
        "fastguard compiled": fastguard_compiled,
        "fastguard measure": measure_segments,
        "fastguard measure flat": measure_segments_flat,
    }
)
