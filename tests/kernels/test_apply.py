"""`apply` in the interpreter agrees with `reference.apply`, in most cases bitwise."""

import math

import pytest
import torch

from fastguard.gradients.buckets import GradBucket, Run, bucketize
from fastguard.stages import reference
from fastguard.stages import triton as triton_stages
from guardtest.tolerances import INTERPRETER_BF16_RTOL

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CHUNK = 4096
MULTIPLIERS = {"1": 1.0, "below-1": 0.3, "0": 0.0, "nan": math.nan, "inf": math.inf}


def gradients(dtype, bad):
    block = 16384 // dtype.itemsize
    grads = [torch.randn(n).to(dtype) for n in (1, 7, 0, CHUNK - 1, block + 1, 2 * CHUNK + 5)]
    if bad:
        grads[0][0] = -math.inf
        grads[3][17] = math.nan
        grads[5][-1] = math.inf
        grads[5][CHUNK] = math.nan
    return grads


def both(grads, multiplier, clean, segments=None):
    """Returns the gradients after the kernel and after the reference."""
    copies = [g.clone() for g in grads]
    n = len(multiplier)
    factors = torch.tensor(multiplier, dtype=torch.float64)
    for half, tensors in ((triton_stages, grads), (reference, copies)):
        bucket = bucketize(tensors, segments=segments, n_segments=n).buckets[0]
        half.apply(bucket, factors, torch.tensor(float(clean)))
    return grads, copies


def assert_same(grads, expected):
    for grad, want in zip(grads, expected, strict=True):
        rtol = INTERPRETER_BF16_RTOL if grad.dtype is torch.bfloat16 else 0
        torch.testing.assert_close(grad, want, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiplier", MULTIPLIERS.values(), ids=MULTIPLIERS)
@pytest.mark.parametrize("bad", [False, True], ids=["finite", "bad"])
@pytest.mark.parametrize("clean", [False, True], ids=["keep", "clean"])
def test_one_segment(dtype, multiplier, bad, clean):
    assert_same(*both(gradients(dtype, bad), [multiplier], clean))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("clean", [False, True], ids=["keep", "clean"])
def test_a_multiplier_that_is_subnormal_in_float32(dtype, clean):
    grads = [g.clamp(-2, 2) * 1e38 for g in gradients(dtype, clean)]
    assert_same(*both(grads, [3e-43], clean))
    assert_same(*both(grads, [1.0, 3e-43, 2.0], clean, [0, 1, 1, 2, 1, 0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clean", [False, True], ids=["keep", "clean"])
def test_each_segment_has_its_own_multiplier(dtype, clean):
    segments = [0, 1, 1, 2, 0, 3]
    assert_same(*both(gradients(dtype, True), [1.0, 0.25, math.nan, 0.7], clean, segments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_multiplier_of_1_writes_nothing(dtype):
    grads = gradients(dtype, True)
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    before = [g.clone().view(as_integers) for g in grads]
    bucket = bucketize(grads).buckets[0]
    for g in grads:
        g.requires_grad_(False)
    triton_stages.apply(bucket, torch.ones(1, dtype=torch.float64), torch.zeros(()))
    for grad, bits in zip(grads, before, strict=True):
        assert torch.equal(grad.view(as_integers), bits)


def test_cleaning_does_not_change_finite_elements():
    grads = gradients(torch.bfloat16, True)
    before = [g.clone() for g in grads]
    bucket = bucketize(grads).buckets[0]
    triton_stages.apply(bucket, torch.ones(1, dtype=torch.float64), torch.ones(()))
    for grad, old in zip(grads, before, strict=True):
        assert torch.equal(grad, torch.where(old.isfinite(), old, 0.0))


def test_a_step_without_changes_does_not_read_the_table():
    """The kernel relies on the verdict's `changes` and reads no multiplier."""
    grads = gradients(torch.float32, False)
    before = [g.clone() for g in grads]
    bucket = bucketize(grads, segments=[0, 1, 1, 2, 1, 0], n_segments=3).buckets[0]
    multiplier = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    triton_stages.apply(bucket, multiplier, torch.zeros(()), torch.zeros(()))
    assert all(map(torch.equal, grads, before))
    triton_stages.apply(bucket, multiplier, torch.zeros(()), torch.ones(()))
    assert not torch.equal(grads[0], before[0])


def test_version_counters_are_incremented():
    grads = gradients(torch.float32, False)
    versions = [g._version for g in grads]
    triton_stages.apply(
        bucketize(grads).buckets[0], torch.full((1,), 0.5).double(), torch.zeros(())
    )
    assert all(g._version > v for g, v in zip(grads, versions, strict=True))


def test_strided_gradients_are_copied_back():
    x = torch.randn(20, 30)
    want = x.clone()
    want[:, ::2] *= 0.5
    triton_stages.apply(
        bucketize([x[:, ::2]]).buckets[0], torch.full((1,), 0.5).double(), torch.zeros(())
    )
    assert torch.equal(x, want)


def test_unaligned_views_do_not_change_their_neighbors():
    flat = torch.ones(100)
    triton_stages.apply(
        bucketize([flat[1:8], flat[9:50]]).buckets[0],
        torch.full((1,), 0.5).double(),
        torch.zeros(()),
    )
    want = torch.full((100,), 0.5)
    want[[0, 8, *range(50, 100)]] = 1.0
    assert torch.equal(flat, want)


def flat_bucket():
    """Returns two gradients in one buffer, with a gap of zeros between them."""
    flat = torch.zeros(CHUNK + 100)
    grads = [flat[:10].normal_(), flat[16 : CHUNK + 90].normal_()]
    flags = (flat.device, flat.dtype, grads, range(2), [0, 0])
    return flat, GradBucket(*flags, runs=(Run(flat, 0),))


@pytest.mark.parametrize("multiplier", MULTIPLIERS.values(), ids=MULTIPLIERS)
@pytest.mark.parametrize("clean", [False, True], ids=["keep", "clean"])
def test_zeros_between_gradients_of_a_flat_bucket_stay_zero(multiplier, clean):
    flat, bucket = flat_bucket()
    flat[3] = flat[CHUNK + 1] = math.inf
    want = flat.clone()
    for part in (want[:10], want[16 : CHUNK + 90]):
        cleaned = torch.where(part.isfinite(), part, 0.0) if clean else part
        part.copy_(cleaned * multiplier if multiplier != 1.0 else cleaned)
    _, counts = triton_stages.measure_bucket(bucket, 1, 2, 2.0)
    assert counts.tolist() == [[0, 0], [1, 1], [0, 0]]
    triton_stages.apply(bucket, torch.tensor([multiplier]).double(), torch.tensor(float(clean)))
    torch.testing.assert_close(flat, want, rtol=0, atol=0, equal_nan=True)
