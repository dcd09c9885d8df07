"""The CPU measurement: norms true to 1e-7 whatever the gradients look like, exact counts."""

import contextlib
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastguard import cpu, cpu_l2, gather, reference
from fastguard.buckets import bucketize
from guardtest.grads import true_norm
from guardtest.tolerances import MEASURED_RTOL

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
BELOW_FLOAT64 = ("fp16", "bf16", "fp32")
NONFINITE = (math.nan, math.inf, -math.inf)

# A float32 norm of 256 times the one is 3.1e-7 too long, of the other 3.1e-7 too short: the worst
# that there are with eight additions at a time.
LONG, SHORT = 1.1553386449813843, 1.1599067449569702


def norm_of(tensors: list[Tensor], norm_type: float = 2.0) -> float:
    """The float64 norm, and that nothing was called non-finite."""
    (bucket,) = bucketize(tensors, norm_type=norm_type).buckets
    (power_sum,), bad = cpu.measure(bucket, 1, norm_type)
    assert bad == {}
    return power_sum if norm_type == math.inf else power_sum ** (1.0 / norm_type)


def assert_norm_is_true(*tensors: Tensor, norm_type: float = 2.0) -> None:
    expected = true_norm(tensors, norm_type)
    assert norm_of(list(tensors), norm_type) == pytest.approx(expected, rel=MEASURED_RTOL, abs=0)


def blocks(values: Tensor, length: int) -> Tensor:
    """A vector in which each value fills `length` elements."""
    return values[:, None].expand(-1, length).reshape(-1)


@pytest.fixture(autouse=True)
def fast_path_for_small_tensors(monkeypatch):
    """What is summed in float64 outright is exact: from here on it is not."""
    monkeypatch.setattr(cpu_l2, "EXACT_BELOW", 2 * cpu_l2.LARGE)


@pytest.fixture
def no_second_look(monkeypatch):
    """Fails where gradients that are clean are read a second time."""

    def second_look(*args):
        raise AssertionError("clean gradients were read twice")

    monkeypatch.setattr(cpu, "_exact", second_look)


@pytest.fixture
def small_stages(monkeypatch):
    """Every branch of the fast path within a few thousand elements."""
    with scaled_down(monkeypatch):
        yield


@contextlib.contextmanager
def scaled_down(monkeypatch):
    with monkeypatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(cpu_l2, name, value)
        patch.setattr(gather, "_local", threading.local())  # buffers of their own
        yield


SMALL = {
    "ROW": 8,
    "BLOCK": 64,
    "ALONE": 100,
    "LARGE": 256,
    "STAGE": 1024,
    "WIDE": 255,
    "SHARE": 4096,
    "EXACT_BELOW": 64,
}


# Accuracy, and where float32 sums go wrong.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1000, 2**17 - 1, 2**17, 2**19 - 1, 2**19, 1_200_000])
@pytest.mark.usefixtures("no_second_look")
def test_random_values(dtype, n):
    assert_norm_is_true(torch.randn(n).to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", BELOW_FLOAT64)
@pytest.mark.parametrize("constant", [1.0, 0.1, LONG, SHORT, 1.9999, 3.3e-3, 777.7])
@pytest.mark.usefixtures("no_second_look")
def test_constants(dtype, constant):
    assert_norm_is_true(torch.full((400_000,), constant).to(DTYPES[dtype]))


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("n_blocks", [64, 128, 196, 256, 384, 500])
def test_blocks_of_two_constants_that_alternate(n_blocks, period):
    # The worst that a sample can meet, above all when it repeats at the pace of the sample.
    which = torch.arange(n_blocks) // period % 2 == 0
    assert_norm_is_true(blocks(torch.where(which, LONG, SHORT), cpu_l2.BLOCK))


@pytest.mark.parametrize("length", [100, cpu_l2.ROW, cpu_l2.BLOCK, 10_000])
def test_blocks_of_many_constants(length):
    assert_norm_is_true(blocks(torch.rand(2 * 10**6 // length) + 1.0, length))


@pytest.mark.parametrize("length", [30, 1000, 70_000])
def test_tensors_of_many_constants(length):
    constants = (torch.rand(max(5, 300_000 // length)) + 1.0).tolist()
    assert_norm_is_true(*(torch.full((length,), c) for c in constants))


@pytest.mark.parametrize("n", [cpu_l2.BLOCK, cpu_l2.ALONE, cpu_l2.ALONE + 1, cpu_l2.LARGE - 1])
@pytest.mark.usefixtures("no_second_look")
def test_many_tensors_of_middling_size(n):
    tensors = [torch.randn(n) for _ in range(1_000_000 // n)]
    assert_norm_is_true(*tensors)
    assert_norm_is_true(*(torch.full_like(t, 0.3) for t in tensors))
    assert_norm_is_true(*(torch.full_like(t, 1.0 + i % 7) for i, t in enumerate(tensors)))
    assert_norm_is_true(*(t.clone().fill_(t[0]) for t in tensors), torch.randn(400_000))


def test_constant_rows_and_rows_that_repeat():
    # The weight gradients of a linear layer under `out.sum()`, either way round.
    rows = torch.randn(1000, 1).expand(1000, 700).contiguous()
    assert_norm_is_true(rows)
    assert_norm_is_true(rows.T.contiguous())
    assert_norm_is_true(torch.outer(torch.randn(900), torch.randn(800)))


@pytest.mark.parametrize("share", [0.5, 0.01, 0.0005])
def test_constant_blocks_in_a_sparse_tensor(share):
    constants = torch.where(torch.rand(800) < share, SHORT, 0.0)
    constants[13] = LONG
    assert_norm_is_true(blocks(constants, cpu_l2.BLOCK))


@pytest.mark.parametrize("where", [0, 5000, -1])
def test_one_heavy_row_holds_everything(where):
    x = torch.full((8000, cpu_l2.ROW), 1e-6)
    x[where] = LONG
    assert_norm_is_true(x)
    y = torch.randn(2_000_000) * 1e-4
    y[where] = 1234.5
    assert_norm_is_true(y)


@pytest.mark.parametrize("spread", [1.0, 5.0, 10.0])
def test_heavy_tails(spread):
    assert_norm_is_true((torch.randn(500_000) * spread).exp())


def test_random_signs_and_integers():
    assert_norm_is_true(torch.randn(300_000).sign() * 0.37)
    assert_norm_is_true(torch.randint(-3, 4, (300_000,)).float())


# Magnitudes.


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-25, 1e-20, 1e-16, 1.0, 1e18, 1e20, 1e33])
@pytest.mark.parametrize("n", [10, 200_000])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_magnitudes_whose_squares_leave_float32(dtype, n, magnitude):
    assert_norm_is_true((torch.randn(n) * magnitude).to(DTYPES[dtype]))


@pytest.mark.parametrize("magnitude", [6e-8, 1e-4, 6e4])
def test_the_range_of_fp16(magnitude):
    assert_norm_is_true((torch.rand(200_000) * magnitude).half())


@pytest.mark.parametrize("magnitude", [1e-150, 1e-30, 1e30, 1e150])
def test_the_range_of_float64(magnitude):
    assert_norm_is_true(torch.randn(300_000).double() * magnitude)


def test_mixed_magnitudes():
    tiny, small, one, big = (torch.randn(150_000) * m for m in (1e-30, 1e-25, 1.0, 1e20))
    assert_norm_is_true(tiny, small)
    assert_norm_is_true(small, one)
    assert_norm_is_true(one, big)
    assert_norm_is_true(tiny, one, big, small)
    assert_norm_is_true(torch.cat([tiny, one, big, small])[torch.randperm(600_000)])


def test_a_large_tensor_of_tiny_values_with_one_row_of_normal_ones():
    x = torch.full((3000, cpu_l2.ROW), 1e-22)
    x[7] = 1e-13
    assert_norm_is_true(x)


def test_float64_sums_that_overflow_are_infinite_and_not_an_error():
    x = torch.full((600_000,), 1e154, dtype=torch.float64)  # several pieces of a finite sum each
    assert norm_of([x]) == math.inf


# Norm types.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 1.5, 3.0, 3.5, math.inf])
@pytest.mark.usefixtures("no_second_look")
def test_norm_types(norm_type, dtype):
    tensors = [torch.randn(n).to(DTYPES[dtype]) for n in (0, 1, 300, 300_000)]
    assert_norm_is_true(*tensors, norm_type=norm_type)


# Shapes and layouts.


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
    (power_sum,), bad = cpu.measure(bucket, 1, norm_type)
    assert power_sum == 40 * 30 - 1 + 49
    assert bad == {0: (1, 0, 0), 1: (0, 0, 1)}


# Edges of the fast path.


def edges() -> list[int]:
    near = {n + d for n in SMALL.values() for d in (-1, 0, 1)}
    return sorted(near | {2 * SMALL["SHARE"] + 17})


@pytest.mark.parametrize("n", edges())
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.usefixtures("small_stages", "no_second_look")
def test_sizes_around_every_edge(dtype, n):
    x = torch.randn(n).to(DTYPES[dtype])
    assert_norm_is_true(x)
    assert_norm_is_true(x, torch.randn(1).to(x.dtype))
    assert_norm_is_true(torch.randn(63).to(x.dtype), x, x)


@pytest.mark.parametrize("length", [1, 7, 64, 100, 255, 256, 257])
@pytest.mark.parametrize("n_tensors", [50, 333])
@pytest.mark.usefixtures("small_stages", "no_second_look")
def test_many_small_tensors(n_tensors, length):
    assert_norm_is_true(*(torch.randn(length) * 1.05**i for i in range(n_tensors)))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_edges_at_their_real_size(monkeypatch, dtype):
    monkeypatch.undo()
    sizes = (cpu_l2.ROW, cpu_l2.BLOCK, cpu_l2.ALONE, cpu_l2.LARGE, cpu_l2.STAGE)
    grads = [torch.randn(n + d).to(DTYPES[dtype]) for n in sizes for d in (-1, 0, 1)]
    assert_norm_is_true(*grads)
    for n in (cpu_l2.EXACT_BELOW - 1, cpu_l2.EXACT_BELOW):
        assert_norm_is_true(torch.randn(n).to(DTYPES[dtype]))


@pytest.mark.usefixtures("small_stages")
def test_every_block_can_be_audited(monkeypatch):
    # One draw from everywhere in turn: a block that is read from the wrong place shows.
    vectors = [torch.randn(n) for n in (300, 5, 70, 0, 64, 1000, 3, 128, 500, 40, 900)]
    n_draws = 400
    everywhere = (cpu.np.arange(n_draws) + 0.5) / n_draws
    monkeypatch.setattr(cpu_l2, "_FEW", everywhere)
    seen = {}
    exact_power_sums = cpu_l2._Blocks.exact_power_sums

    def spy(self, drawn):
        sums = exact_power_sums(self, drawn)
        seen.update(zip(drawn.tolist(), sums.tolist(), strict=True))
        return sums

    monkeypatch.setattr(cpu_l2._Blocks, "exact_power_sums", spy)
    assert_norm_is_true(*vectors)
    assert sorted(seen) == list(range(len(seen)))
    block, large = SMALL["BLOCK"], SMALL["LARGE"]
    rows = [
        v[k * block :][:block] for v in vectors if len(v) >= large for k in range(len(v) // block)
    ]
    middling = [v for v in vectors if block <= len(v) < large]
    expected = [v.double().square().sum().item() for v in rows + middling]
    assert [seen[k] for k in sorted(seen)] == pytest.approx(expected)


def test_vectors_and_matrices_are_gathered_together():
    vector, matrix = torch.randn(7), torch.randn(5, 2)
    nothing = torch.empty(0)
    for tensors in ([vector, matrix, vector], [matrix, vector], [nothing, matrix, matrix, nothing]):
        ((values, start, stop),) = gather.gathered(tensors, 100)
        assert torch.equal(values, torch.cat([t.reshape(-1) for t in tensors]))
        assert (start, stop) == (0, len(tensors))


# Counts.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("bad", NONFINITE)
def test_one_bad_value_in_the_last_element(bad, norm_type, dtype):
    tensors = [torch.randn(n).to(DTYPES[dtype]) for n in (5, 150_000, 3, 0, 400)]
    tensors[1][-1] = bad
    (bucket,) = bucketize(tensors, norm_type=norm_type).buckets
    (power_sum,), found = cpu.measure(bucket, 1, norm_type)
    assert found == {1: (int(bad != bad), int(bad == math.inf), int(bad == -math.inf))}
    root = power_sum if norm_type == math.inf else power_sum ** (1.0 / norm_type)
    assert root == pytest.approx(true_norm(tensors, norm_type), rel=MEASURED_RTOL, abs=0)


def test_all_elements_bad():
    tensors = [torch.full((700_000,), math.nan), torch.tensor([math.inf, -math.inf, math.inf])]
    (bucket,) = bucketize(tensors).buckets
    assert cpu.measure(bucket, 1, 2.0) == ([0.0], {0: (700_000, 0, 0), 1: (0, 2, 1)})


def test_a_bad_tensor_that_spans_several_pieces_is_counted_once_and_whole():
    x = torch.ones(1_000_000)
    x[::250_000] = math.nan
    x[-3:] = math.inf
    (bucket,) = bucketize([torch.ones(7), x]).buckets
    assert cpu.measure(bucket, 1, 2.0) == ([7.0 + 1_000_000 - 7], {1: (4, 3, 0)})


def test_overflow_of_the_sum_is_not_an_infinite_element():
    assert_norm_is_true(torch.full((200_000,), 1e38))
    assert_norm_is_true(torch.full((200_000,), 3e38), norm_type=3.5)


def test_a_huge_value_beside_an_infinite_one():
    tensors = [torch.tensor([1e20]), torch.tensor([math.inf, 1.0])]
    (bucket,) = bucketize(tensors).buckets
    (power_sum,), bad = cpu.measure(bucket, 1, 2.0)
    assert math.sqrt(power_sum) == pytest.approx(float(torch.tensor(1e20)), rel=MEASURED_RTOL)
    assert bad == {1: (0, 1, 0)}


def test_segments_are_measured_apart():
    tensors = [torch.full((n,), float(n)) for n in (1, 2, 3, 4)]
    tensors[2][0] = math.nan
    buckets = bucketize(tensors, segments=[1, 0, 3, 1], n_segments=4)
    sums, bad = cpu.measure(buckets.buckets[0], 4, 2.0)
    assert sums == [8.0, 1.0 + 64.0, 0.0, 18.0]
    assert bad == {2: (1, 0, 0)}


# Any list of tensors: the same as the definition.


@st.composite
def gradients(draw):
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    sizes = draw(st.lists(st.integers(0, 700) | st.sampled_from(edges()), min_size=1, max_size=12))
    scale = draw(st.sampled_from([1e-4, 1.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = [(torch.randn(n, generator=generator) * scale).to(dtype) for n in sizes]
    n_bad = draw(st.sampled_from([0, 0, 1, 3]))
    for _ in range(n_bad):
        victim = draw(st.sampled_from(tensors))
        if victim.numel():
            victim[draw(st.integers(0, victim.numel() - 1))] = draw(st.sampled_from(NONFINITE))
    n_segments = draw(st.integers(1, 3))
    segments = [draw(st.integers(0, n_segments - 1)) for _ in tensors]
    return tensors, segments, n_segments


@hypothesis.given(gradients(), st.sampled_from([0.5, 1.0, 2.0, 3.5, math.inf]))
@hypothesis.settings(
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_agrees_with_the_definition(monkeypatch, case, norm_type):
    tensors, segments, n_segments = case
    (bucket,) = bucketize(tensors, segments=segments, n_segments=n_segments).buckets
    plain, plain_counts = reference.plain_measure(bucket, n_segments, len(tensors), norm_type)
    with scaled_down(monkeypatch):
        summary, counts = reference.measure(bucket, n_segments, len(tensors), norm_type)
    assert torch.equal(counts, plain_counts)
    assert torch.equal(summary[1:], plain[1:])
    torch.testing.assert_close(summary[0], plain[0], rtol=2 * MEASURED_RTOL, atol=0)


# Behaviour of the whole.


@pytest.mark.parametrize("dtype", DTYPES)
def test_determinism(dtype):
    tensors = [torch.randn(n).to(DTYPES[dtype]) for n in (100, 300_000, 5000)]
    first = norm_of(tensors)
    norm_of([torch.randn(400_000)])  # leaves other numbers in the staging buffer
    assert norm_of([t.clone() for t in tensors]) == first


def test_many_threads_at_once():
    def work(k: int) -> float:
        generator = torch.Generator().manual_seed(k)
        sizes = [90, 70_000, *[4000] * 30]  # most of it goes through the staging buffer
        tensors = [torch.randn(n, generator=generator) for n in sizes]
        return norm_of(tensors)

    alone = [work(k) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, list(range(8)) * 6)) == alone * 6


@pytest.mark.parametrize("default", ["meta", "float64", "inference_mode"])
def test_ambient_defaults_change_nothing(default, monkeypatch):
    monkeypatch.setattr(gather, "_local", threading.local())
    sizes = (100, 200_000)
    tensors = [torch.arange(n, dtype=torch.float32) for n in sizes]
    expected = norm_of(tensors)
    monkeypatch.setattr(gather, "_local", threading.local())
    dtype = torch.get_default_dtype()
    ambience = {
        "meta": lambda: torch.device("meta"),  # as after torch.set_default_device("cuda")
        "float64": contextlib.nullcontext,
        "inference_mode": torch.inference_mode,
    }[default]
    try:
        with ambience():
            if default == "float64":
                torch.set_default_dtype(torch.float64)
            assert norm_of(tensors) == expected
            assert norm_of([tensors[0][:0]], math.inf) == 0.0
    finally:
        torch.set_default_dtype(dtype)
    assert norm_of(tensors) == expected


def test_gradients_of_gradients_are_measured_without_a_graph():
    x = torch.randn(200_000, requires_grad=True)
    with torch.no_grad():
        assert norm_of([x * 2.0]) == pytest.approx(2 * norm_of([x]), rel=MEASURED_RTOL)
    assert_norm_is_true(*(x.view(-1, 5000) * 2.0).unbind())


def allocated_at_most(work) -> int:
    """Bytes that torch held at the worst moment of `work`, above what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    deltas = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert deltas, "the profiler saw no allocation at all"
    return max(itertools.accumulate(deltas))


N = 5_000_000


BULKY = {
    "fp32": lambda: [torch.ones(N)],
    "bf16": lambda: [torch.ones(N, dtype=torch.bfloat16)],
    "fp64": lambda: [torch.ones(N, dtype=torch.float64)],
    "1000 small": lambda: [torch.ones(N // 1000) for _ in range(1000)],
    "1000 small bf16": lambda: [torch.ones(N // 1000).bfloat16() for _ in range(1000)],
    "channels_last": lambda: [
        torch.ones(100, 50, 100, 10).contiguous(memory_format=torch.channels_last)
    ],
    "transposed": lambda: [torch.ones(2000, 2500).T],
    "overflow": lambda: [torch.full((N,), 1e20)],
    "underflow": lambda: [torch.full((N,), 1e-25)],
    "all NaN": lambda: [torch.full((N,), math.nan)],
    "disagreeing blocks": lambda: [blocks(torch.rand(N // cpu_l2.BLOCK) + 1.0, cpu_l2.BLOCK)],
}


@pytest.mark.parametrize(
    ("case", "norm_type"),
    [*((case, 2.0) for case in BULKY), ("all NaN", 3.5), ("fp64", 1.0), ("transposed", math.inf)],
)
def test_working_memory_stays_under_16_MB(monkeypatch, case, norm_type):
    (bucket,) = bucketize(BULKY[case]()).buckets
    monkeypatch.setattr(gather, "_local", threading.local())  # its buffers count too
    assert allocated_at_most(lambda: cpu.measure(bucket, 1, norm_type)) < 16 * 2**20
