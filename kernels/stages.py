"""The three stages that have kernels, with the signatures and results of `fastguard.reference`.

    measure   chunk table -> launch 1 (two with several segments)      reads N bytes
    decide    launch 2, one program                                    reads and writes O(S + K * W)
    apply     chunk table -> launch 3                                  nothing, or 2N bytes

Nothing here waits for the device.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from fastguard.buckets import GradBucket
from fastguard.kernels.apply import apply_chunks
from fastguard.kernels.chunks import ChunkTable, table_of
from fastguard.kernels.measure import measure_chunks, n_programs

_diagnostics = {"copied_gradients": 0}


def diagnostics() -> dict[str, int]:
    """What happened since the process began and costs more than it should.

    Returns:
        `copied_gradients`: how often a gradient with strides that leave holes, or that overlaps
        another, was copied to be measured or changed.
    """
    return dict(_diagnostics)


def measure(
    bucket: GradBucket,
    n_segments: int,
    n_tensors: int,
    norm_type: float,
    inv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Power sums and counts of one bucket: see `fastguard.reference.measure`."""
    table = table_of(bucket, n_segments, n_programs(bucket.device))
    _copy_in(table, bucket)
    return measure_chunks(
        table, bucket.device, bucket.dtype, n_segments, n_tensors, norm_type, inv_scale
    )


def _copy_in(table: ChunkTable, bucket: GradBucket) -> None:
    for position, buffer in table.copies:
        buffer.copy_(bucket.grads[position])
        _diagnostics["copied_gradients"] += 1


def apply(bucket: GradBucket, multiplier: Tensor, clean: Tensor) -> None:
    """Scales and cleans one bucket in place: see `fastguard.reference.apply`."""
    device = bucket.device
    multiplier = multiplier.contiguous()  # one number expanded to all segments is not
    table = table_of(bucket, multiplier.numel(), n_programs(device))
    _copy_in(table, bucket)
    apply_chunks(table, device, bucket.dtype, multiplier, clean)
    for position, buffer in table.copies:
        bucket.grads[position].copy_(buffer)
    # Autograd does not see a kernel's writes; the gradients of a run share its version counter.
    written = bucket.grads if bucket.runs is None else [run.flat for run in bucket.runs]
    increment_version(written)
