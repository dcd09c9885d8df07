"""The watching stage in the interpreter equals the reference, bit for bit."""

import itertools

import pytest
import torch

from fastguard import FlatGradBuckets
from fastguard.gradients.buckets import bucketize
from fastguard.stages import reference
from fastguard.stages import triton as triton_stages

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CHUNK = 4096  # elements per chunk of a small model
WANTED = [(True, False), (False, True), (True, True)]


def tensors(dtype, sizes):
    """Returns tensors with zeros of both signs, NaN, and magnitudes down to subnormals."""
    torch.manual_seed(0)
    made = []
    for n in sizes:
        t = (torch.randn(n, dtype=torch.float64) * 2.0 ** torch.randint(-160, 20, (n,))).to(dtype)
        t[::5], t[2::7], t[3::11] = 0.0, -0.0, float("nan")
        made.append(t)
    return made


def sizes(dtype):
    """Returns sizes around the edges of a vector, a block and a chunk, and 0."""
    edges = (16 // dtype.itemsize, 16384 // dtype.itemsize, CHUNK, 2 * CHUNK)
    return sorted({0, 1, *(e + d for e in edges for d in (-1, 0, 1))})


def check_bits(bucket, n_segments, nonzero, checksum):
    found = triton_stages.read_bits(bucket, n_segments, nonzero, checksum)
    expected = reference.read_bits(bucket, n_segments, nonzero, checksum)
    assert found.dtype == torch.int64 and found.shape == (n_segments + 1,)
    if nonzero:
        assert found[:-1].tolist() == expected[:-1].tolist()
    if checksum:
        assert found[-1].item() % 2**32 == expected[-1].item() % 2**32


def check_exponents(bucket, stride, inv_scale=None):
    found = triton_stages.count_exponents(bucket, stride, inv_scale)
    assert torch.equal(found, reference.count_exponents(bucket, stride, inv_scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", WANTED, ids=["nonzero", "checksum", "both"])
def test_bits_of_sizes_around_every_edge(dtype, wanted):
    given = tensors(dtype, sizes(dtype))
    [bucket] = bucketize(given).buckets
    check_bits(bucket, 1, *wanted)
    n = len(given)
    [bucket] = bucketize(given, segments=range(n), n_segments=n).buckets
    check_bits(bucket, n, *wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 77, 10_001])
def test_exponents_of_sizes_around_every_edge(dtype, stride):
    few = tensors(dtype, [0, 1, 5, CHUNK - 1, CHUNK + 1, 3 * CHUNK])
    [bucket] = bucketize(few).buckets
    check_exponents(bucket, stride)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64], ids=str)
def test_exponents_are_unscaled(dtype, scale_dtype):
    [bucket] = bucketize(tensors(dtype, [999])).buckets
    check_exponents(bucket, 1, torch.tensor(2.0**-31 / 3, dtype=scale_dtype))


def test_views_of_one_buffer_are_sampled_tensor_by_tensor():
    """Adjacent gradients share stretches and chunks, as those of DDP and of flat buckets do."""
    whole = tensors(torch.float32, [3 * CHUNK])[0]
    cuts = [5, 700, 0, CHUNK + 3, 1, 2000]
    views = list(whole[1 : 1 + sum(cuts)].split(cuts))
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in cuts]
    for p, view in zip(parameters, views, strict=True):
        p.grad = view.clone()
    for buckets in (bucketize(views), FlatGradBuckets(parameters).buckets()):
        [bucket] = buckets.buckets
        for stride in (1, 33):
            check_exponents(bucket, stride)
        check_bits(bucket, 1, True, True)


def test_other_layouts():
    x = torch.randn(6, 5, 4, 3)
    given = [
        x.to(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2),
        torch.randn(9)[::2],
        torch.randn(33)[1:],
        torch.tensor(-0.0),
    ]
    [bucket] = bucketize(given, segments=range(5), n_segments=5).buckets
    check_bits(bucket, 5, True, True)
    check_exponents(bucket, 3)


def test_the_table_of_measure_is_reused():
    given = tensors(torch.float32, [100, 200])
    for segments in (None, range(2)):
        [bucket] = bucketize(given, segments=segments, n_segments=2).buckets
        triton_stages.measure_bucket(bucket, 2, 2, 2.0)
        triton_stages.read_bits(bucket, 2, True, True)
        triton_stages.count_exponents(bucket, 3)
        assert list(bucket.memo.tables) == [2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_flipped_bit_changes_the_checksum(dtype):
    t = torch.randn(CHUNK + 2).to(dtype)
    data = t.view(torch.uint8)

    def checksum():
        [bucket] = bucketize([t]).buckets
        return triton_stages.read_bits(bucket, 1, False, True)[1].item() % 2**32

    before = checksum()
    for place, bit in itertools.product((0, len(data) // 2 + 1, len(data) - 1), (0, 5, 7)):
        data[place] ^= 1 << bit
        assert checksum() != before
        data[place] ^= 1 << bit
    assert checksum() == before
