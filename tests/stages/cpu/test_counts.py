"""Counts of NaN, +Inf and -Inf on a CPU are exact, and a sum that overflows is not counted."""

import math

import pytest
import torch

from fastguard.gradients.buckets import bucketize
from fastguard.stages.cpu import measure as cpu_measure
from guardtest.cpu_norms import NONFINITE, assert_norm_is_true, root_of
from guardtest.grads import DTYPES, true_norm
from guardtest.tolerances import MEASURED_RTOL


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("bad", NONFINITE)
def test_one_bad_value_in_the_last_element(bad, norm_type, dtype):
    tensors = [torch.randn(n).to(DTYPES[dtype]) for n in (5, 150_000, 3, 0, 400)]
    tensors[1][-1] = bad
    (bucket,) = bucketize(tensors, norm_type=norm_type).buckets
    (power_sum,), found = cpu_measure.power_sums(bucket, 1, norm_type)
    assert found == {1: (int(bad != bad), int(bad == math.inf), int(bad == -math.inf))}
    root = root_of(power_sum, bucket.dtype, norm_type)
    assert root == pytest.approx(true_norm(tensors, norm_type), rel=MEASURED_RTOL, abs=0)


def test_all_elements_bad():
    tensors = [torch.full((700_000,), math.nan), torch.tensor([math.inf, -math.inf, math.inf])]
    (bucket,) = bucketize(tensors).buckets
    assert cpu_measure.power_sums(bucket, 1, 2.0) == ([0.0], {0: (700_000, 0, 0), 1: (0, 2, 1)})


def test_a_bad_tensor_in_several_pieces_is_counted_completely_and_once():
    x = torch.ones(1_000_000)
    x[::250_000] = math.nan
    x[-3:] = math.inf
    (bucket,) = bucketize([torch.ones(7), x]).buckets
    assert cpu_measure.power_sums(bucket, 1, 2.0) == ([7.0 + 1_000_000 - 7], {1: (4, 3, 0)})


@pytest.mark.parametrize("n", [5, 5_000, 70_000, 2_000_000])
@pytest.mark.parametrize("bits", [0x7FA00000, 0xFFA00001, 0x7FC00000, 0x7F800000, 0x7F7FFFFF])
@pytest.mark.filterwarnings("error")
def test_no_bit_pattern_causes_a_warning(bits, n):
    """A signaling NaN sets a processor flag, for which numpy warns."""
    pattern = torch.tensor(bits).to(torch.int32).view(torch.float32)
    for places in (slice(-1, None), slice(0, n, 2)):
        x = torch.ones(n)
        x.view(torch.int32)[places] = pattern.view(torch.int32)
        (bucket,) = bucketize([x, torch.ones(3)]).buckets
        (power_sum,), bad = cpu_measure.power_sums(bucket, 1, 2.0)
        finite = x[x.isfinite()].double().square().sum().item() + 3.0
        assert power_sum == pytest.approx(finite, rel=MEASURED_RTOL, abs=0)
        assert sum(bad.get(0, (0,))) == (~x.isfinite()).sum()


def test_overflow_of_the_sum_is_not_an_infinite_element():
    assert_norm_is_true(torch.full((200_000,), 1e38))
    assert_norm_is_true(torch.full((200_000,), 3e38), norm_type=3.5)


def test_a_huge_and_an_infinite_value():
    tensors = [torch.tensor([1e20]), torch.tensor([math.inf, 1.0])]
    (bucket,) = bucketize(tensors).buckets
    (power_sum,), bad = cpu_measure.power_sums(bucket, 1, 2.0)
    assert math.sqrt(power_sum) == pytest.approx(float(torch.tensor(1e20)), rel=MEASURED_RTOL)
    assert bad == {1: (0, 1, 0)}


def test_segments_are_measured_separately():
    tensors = [torch.full((n,), float(n)) for n in (1, 2, 3, 4)]
    tensors[2][0] = math.nan
    buckets = bucketize(tensors, segments=[1, 0, 3, 1], n_segments=4)
    sums, bad = cpu_measure.power_sums(buckets.buckets[0], 4, 2.0)
    assert sums == [8.0, 1.0 + 64.0, 0.0, 18.0]
    assert bad == {2: (1, 0, 0)}
