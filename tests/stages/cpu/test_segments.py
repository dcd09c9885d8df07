"""Segments on a CPU: measured independently, without reading all runs for each of them."""

import math
from dataclasses import replace

import pytest
import torch

from fastguard import FlatGradBuckets
from fastguard.gradients.buckets import bucketize
from fastguard.stages.cpu import measure as cpu_measure
from guardtest.cpu_norms import root_of
from guardtest.grads import DTYPES, true_norm
from guardtest.tolerances import MEASURED_RTOL

SIZES = [1, 7, 0, 100, cpu_measure.SMALL, cpu_measure.SMALL + 1, 3, 0, 64, 2000, 5, 40_000, 12, 9]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_segments_of_one_tensor_of_every_size(dtype, norm_type):
    grads = [torch.randn(n).mul(0.1 * (i + 1)).to(DTYPES[dtype]) for i, n in enumerate(SIZES)]
    (bucket,) = bucketize(
        grads, segments=range(len(grads)), n_segments=len(grads), norm_type=norm_type
    ).buckets
    sums, bad = cpu_measure.power_sums(bucket, len(grads), norm_type)
    assert not bad
    for grad, measured in zip(grads, sums, strict=True):
        norm = root_of(measured, grad.dtype, norm_type)
        assert norm == pytest.approx(true_norm([grad], norm_type), rel=MEASURED_RTOL, abs=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_tensor_among_small_ones_does_not_affect_the_others(value):
    grads = [torch.full((4,), float(i)) for i in range(20)]
    grads[7][2] = value
    (bucket,) = bucketize(grads, segments=range(20), n_segments=20).buckets
    sums, bad = cpu_measure.power_sums(bucket, 20, 2.0)
    assert bad == {7: (int(value != value), int(value == math.inf), int(value == -math.inf))}
    assert sums == [(3 if i == 7 else 4) * float(i * i) for i in range(20)]


@pytest.mark.usefixtures("no_second_read")
def test_small_tensors_of_zeros_are_read_once():
    grads = [torch.zeros(64) for _ in range(20)]
    (bucket,) = bucketize(grads, segments=range(20), n_segments=20).buckets
    assert cpu_measure.power_sums(bucket, 20, 2.0) == ([0.0] * 20, {})


def test_shapes_and_strides_of_small_tensors():
    grads = [torch.randn(6, 10).T, torch.randn(()), torch.randn(4, 3, 2)[:, ::2]] * 5
    (bucket,) = bucketize(grads, segments=range(15), n_segments=15).buckets
    sums, _ = cpu_measure.power_sums(bucket, 15, 2.0)
    assert sums == pytest.approx([g.double().square().sum().item() for g in grads])


class Counted(tuple):
    """A tuple that counts how often it is iterated over."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


def test_the_runs_of_flat_buckets_are_not_iterated_for_each_segment():
    parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(100)]
    for i, p in enumerate(parameters):
        p.grad = torch.full((5,), float(i))
    flat = FlatGradBuckets(parameters, segments=range(100), n_segments=100)
    (bucket,) = flat.buckets().buckets
    assert bucket.runs is not None
    runs = Counted(bucket.runs)
    sums, _ = cpu_measure.power_sums(replace(bucket, runs=runs), 100, 2.0)
    assert sums == [5.0 * i * i for i in range(100)]
    assert runs.reads == 2  # once for their addresses, and once to group them by segment
