"""Empty and non-contiguous gradients on a CPU, and small ones that are gathered."""

import math

import pytest
import torch

from fastguard.gradients import vectors
from fastguard.gradients.buckets import bucketize
from fastguard.stages.cpu import measure as cpu_measure
from guardtest.cpu_norms import assert_norm_is_true, norm_of
from guardtest.grads import DTYPES, true_norm


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_empty_tensors(norm_type):
    empty = [torch.empty(0), torch.empty(3, 0, 2)]
    assert norm_of(empty, norm_type) == 0.0
    assert_norm_is_true(*empty, torch.randn(200_000), *empty, norm_type=norm_type)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("n", [20, 300])
def test_non_contiguous(n, dtype, norm_type):
    x = torch.randn(n, 3, n, 2).to(DTYPES[dtype])
    views = {
        "transposed": x.transpose(0, 2),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "slice": x[:, 1:, ::2],
        "strided vector": x.view(-1)[::3],
        "expanded": x[:, :, :, :1].expand(-1, -1, -1, 2),
        "scalar": x[0, 0, 0, 0],
    }
    for name, view in views.items():
        expected = true_norm([view], norm_type)
        assert norm_of([view], norm_type) == pytest.approx(expected, rel=1e-7, abs=0), name


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_nonfinite_elements_of_non_contiguous_tensors(norm_type):
    x = torch.ones(40, 30).T
    x[29, 39] = math.nan
    y = torch.ones(10, 10)[:, ::2]
    y[0, 0] = -math.inf
    (bucket,) = bucketize([x, y]).buckets
    (power_sum,), bad = cpu_measure.power_sums(bucket, 1, norm_type)
    assert power_sum == 40 * 30 - 1 + 49
    assert bad == {0: (1, 0, 0), 1: (0, 0, 1)}


def test_vectors_and_matrices_are_gathered_together():
    vector, matrix = torch.randn(7), torch.randn(5, 2)
    nothing = torch.empty(0)
    for tensors in ([vector, matrix, vector], [matrix, vector], [nothing, matrix, matrix, nothing]):
        ((values, start, stop),) = vectors.gathered(tensors, 100)
        assert torch.equal(values, torch.cat([t.reshape(-1) for t in tensors]))
        assert (start, stop) == (0, len(tensors))
