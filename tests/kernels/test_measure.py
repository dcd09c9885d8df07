"""`measure` in the interpreter agrees with `reference.measure_bucket`, the float64 definition."""

import itertools
import math

import pytest
import torch

from fastguard.commands.environment import environment
from fastguard.gradients.buckets import bucketize
from fastguard.stages import reference
from fastguard.stages import triton as triton_stages
from guardtest.roundings import BAD_PATTERNS, sum_whole_vectors
from guardtest.tolerances import KEPT_RTOL, MEASURED_RTOL

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BAD = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf}
CHUNK = 4096  # elements per chunk of a small model
short = str


def bucket_of(grads, segments=None, n_segments=1):
    return bucketize(grads, segments=segments, n_segments=n_segments).buckets[0]


def check(grads, norm_type=2.0, segments=None, n_segments=1, inv_scale=None):
    """Checks that counts are equal and that norms have at most the documented error."""
    bucket = bucket_of(grads, segments, n_segments)
    arguments = (bucket, n_segments, len(grads), norm_type, inv_scale)
    summary, counts = triton_stages.measure_bucket(*arguments)
    expected, expected_counts = reference.measure_bucket(*arguments)
    assert summary.dtype == torch.float64 and summary.shape == expected.shape
    torch.testing.assert_close(counts, expected_counts, rtol=0, atol=0)
    torch.testing.assert_close(summary[1:], expected[1:], rtol=0, atol=0)
    float64 = norm_type != 2.0 or bucket.dtype is torch.float64
    # The relative error of a power sum is p times that of its norm; of float64 sums, n * eps.
    rtol = 1e-12 if float64 else 2 * MEASURED_RTOL
    torch.testing.assert_close(summary[0], expected[0], rtol=rtol, atol=0)
    return summary, counts


def sizes(dtype):
    """Returns sizes around the edges of a vector, a block and a chunk, and 0."""
    vec = 16 // dtype.itemsize
    block = 16384 // dtype.itemsize
    edges = (vec, block, CHUNK, 2 * CHUNK)
    return sorted({0, 1, *(e + d for e in edges for d in (-1, 0, 1))})


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0], ids=short)
def test_sizes_around_every_edge(dtype, norm_type):
    grads = [torch.randn(n).to(dtype) for n in sizes(dtype)]
    check(grads, norm_type)
    check(grads, norm_type, segments=[i % 3 for i in range(len(grads))], n_segments=4)


PLACES = {
    "first": 0,
    "head": 1,
    "body": 3000,
    "chunk-edge": CHUNK,
    "tail": -2,
    "last": -1,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 0.5], ids=short)
def test_each_bad_value_at_each_position(dtype, norm_type):
    """Tests all combinations at one size, with one tensor per case and all cases in one call."""
    cases = list(itertools.product(PLACES.values(), BAD.values()))
    grads = []
    for place, value in cases:
        grad = torch.randn(CHUNK + 3).to(dtype)
        grad[place] = value
        grads.append(grad)
    _, counts = check(grads, norm_type)
    assert counts.sum(0).tolist() == [1] * len(cases)
    n = len(grads)
    check(grads, norm_type, segments=range(n), n_segments=n)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_bad_values_of_all_kinds_in_unaligned_neighbors(dtype):
    flat = torch.randn(3 * CHUNK).to(dtype)
    grads = list(flat[1:].split([5, 1, CHUNK, 7, 2 * CHUNK - 14]))
    for grad, value in zip(grads, [*BAD.values(), *BAD.values()], strict=False):
        grad[-1] = value
    check(grads)
    check(grads, segments=[0, 0, 1, 1, 0], n_segments=2)


def test_everything_is_nan():
    _, counts = check([torch.full((CHUNK + 9,), math.nan), torch.full((70,), math.nan)])
    assert counts[0].tolist() == [CHUNK + 9, 70]


def norm_error(grads):
    bucket = bucket_of(grads)
    measured = triton_stages.measure_bucket(bucket, 1, len(grads), 2.0)[0][0].sqrt()
    true = reference.measure_bucket(bucket, 1, len(grads), 2.0)[0][0].sqrt()
    return (measured / true - 1).abs().item()


@pytest.fixture(params=[False, True], ids=["any-card", "slow-fp64"])
def bound(request, dtype, monkeypatch):
    """Returns the bound of the error of a norm, for GPUs with fast and slow fp64."""
    if not request.param:
        return MEASURED_RTOL
    sum_whole_vectors(monkeypatch, dtype)
    return KEPT_RTOL


MAGNITUDES = [1e-40, 1e-30, 1e-25, 1e-21, 1e-20, 1e-19, 1e-8, 1.0, 1e8, 1e18, 1e20, 1e30, 1e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_the_norm_is_accurate_at_any_magnitude(dtype, bound):
    for magnitude in MAGNITUDES:
        x = torch.randn(CHUNK + 70, dtype=torch.float64) * magnitude
        x = x.clamp(-3e38, 3e38).to(dtype)
        assert norm_error([x]) <= bound, magnitude


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=short)
def test_constant_arrays_round_the_same_way_everywhere(dtype, bound):
    for value in (1.0, 0.1, 1 / 3, math.pi, 1.0005, 0.7071):
        assert norm_error([torch.full((CHUNK + 5,), value).to(dtype)]) <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=short)
def test_repeated_patterns_that_lose_the_small_squares(dtype, bound):
    """Every group has a large value next to a small one, whose square float32 loses."""
    for exponent in (-11.0, -11.9, -12.1, -12.4, -13.0):
        for width in (2, 4, 8):
            pattern = torch.full((width,), 2.0**exponent)
            pattern[0] = 1.0
            x = pattern.repeat(CHUNK // width).to(dtype)
            assert norm_error([x]) <= bound


@pytest.mark.parametrize("dtype", BAD_PATTERNS, ids=short)
@pytest.mark.parametrize("repeats", [1, 7, 1000, 100_000])  # 100,000 gives many blocks per chunk
def test_patterns_that_always_round_the_same_way(dtype, repeats, bound):
    assert norm_error([torch.tensor(BAD_PATTERNS[dtype]).to(dtype).repeat(repeats)]) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_mixtures_of_magnitudes(dtype):
    tiny = torch.full((CHUNK,), 1e-25).to(dtype)
    mixed = tiny.clone()
    mixed[:8] = 1e-18
    for grads in ([tiny, mixed], [tiny, torch.ones(8).to(dtype)], [mixed, torch.zeros(CHUNK)]):
        check([g.to(dtype) for g in grads])


def test_a_chunk_of_zeros_is_not_read_twice(monkeypatch):
    """Zeros have no small squares to lose, so grouped sums of 0 are trusted."""
    summary, _ = check([torch.zeros(CHUNK).bfloat16(), torch.zeros(3).bfloat16()])
    assert summary[0].item() == 0.0


def test_a_large_finite_gradient_does_not_count_as_infinite():
    for dtype, value in ((torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float64, 1e200)):
        x = torch.full((100,), value, dtype=dtype)
        summary, counts = triton_stages.measure_bucket(bucket_of([x]), 1, 1, 2.0)
        assert counts.sum() == 0 and summary[1:].sum() == 0
        assert summary[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
@pytest.mark.parametrize("norm_type", [2.0, 3.0, 0.5, 10.0, 100.0], ids=short)
@pytest.mark.parametrize("magnitude", [1e200, 1e-200, 1e-310, 1e30, 1e-30, 0.0])
def test_norms_whose_powers_overflow_float64(dtype, norm_type, magnitude):
    if dtype is torch.float32 and (norm_type < 3.0 or not 1e-40 < magnitude < 1e40):
        pytest.skip("float64 holds these")
    grads = [torch.rand(n).double().mul(magnitude).to(dtype) for n in (CHUNK + 5, 7, 0, 300)]
    grads[1][2] = math.nan
    grads[3][0] = -math.inf
    check(grads, norm_type)
    check(grads, norm_type, segments=[0, 1, 0, 1], n_segments=3, inv_scale=torch.tensor(2.0**-16))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0], ids=short)
@pytest.mark.parametrize("n_segments", [1, 2])
def test_inv_scale_is_applied_to_the_sums(norm_type, n_segments):
    grads = [torch.randn(100) * 65536, torch.randn(9) * 65536]
    for inv_scale in (torch.tensor(2.0**-16), torch.tensor(1 / 3, dtype=torch.float64)):
        check(
            grads, norm_type, list(range(2))[:n_segments] * (2 // n_segments), n_segments, inv_scale
        )


def test_one_segment_per_tensor():
    grads = [torch.randn(1 + i % 5) for i in range(100)]
    check(grads, segments=range(100), n_segments=100)


def test_determinism():
    """Two runs are bitwise equal, in whatever order tables were cached."""
    grads = [torch.randn(3 * CHUNK + 1), torch.randn(77)]
    first = triton_stages.measure_bucket(bucket_of(grads), 1, 2, 2.0)[0]
    for _ in range(3):
        again = triton_stages.measure_bucket(bucket_of([g.clone() for g in grads]), 1, 2, 2.0)[0]
        assert torch.equal(first, again)


def test_strided_gradients_are_copied_and_counted():
    x = torch.randn(40, 30)
    before = triton_stages.diagnostics()["copied_gradients"]
    check([x.t(), x.clone().to(memory_format=torch.contiguous_format)])
    # The tensor is one block of memory.
    assert triton_stages.diagnostics()["copied_gradients"] == before
    check([x[:, ::2], torch.ones(1).expand(4, 5)])
    assert triton_stages.diagnostics()["copied_gradients"] == before + 2
    assert environment()["diagnostics"] == triton_stages.diagnostics()


def test_the_same_gradient_twice_counts_twice():
    x = torch.randn(50)
    x[3] = math.nan
    _, counts = check([x, x, x[10:20]])
    assert counts[0].tolist() == [1, 1, 0]


def test_only_empty_tensors():
    summary, counts = check([torch.zeros(0), torch.zeros(3, 0)])
    assert not summary.any() and not counts.any()
