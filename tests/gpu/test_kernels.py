"""The kernels on a GPU agree with the reference and torch, also in graphs and on streams."""

import math

import pytest
import torch

import fastguard
from fastguard.gradients.buckets import bucketize
from fastguard.stages import reference
from fastguard.stages.contract import Policy, Signals
from fastguard.stages.grad_stats import GradStats
from guardtest.graphs import captured
from guardtest.roundings import BAD_PATTERNS, sum_whole_vectors
from guardtest.tolerances import KEPT_RTOL, MEASURED_RTOL, NORM_RTOL

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [0, 1, 7, 8, 4095, 4096, 4097, 65536, 65537, 300_000]


def gradients(dtype, bad=False):
    grads = [torch.randn(n, device="cuda").to(dtype) for n in SIZES]
    if bad:
        grads[4][17], grads[9][-1], grads[8][0] = math.nan, math.inf, -math.inf
    return grads


def parameters_with(grads):
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    return parameters


def check_measure(stages, grads, norm_type=2.0, segments=None, n_segments=1):
    bucket = bucketize(grads, segments=segments, n_segments=n_segments).buckets[0]
    arguments = (bucket, n_segments, len(grads), norm_type, None)
    summary, counts = stages.measure_bucket(*arguments)
    want, want_counts = reference.measure_bucket(*arguments)
    assert torch.equal(counts, want_counts) and torch.equal(summary[1:], want[1:])
    exact = norm_type != 2.0 or bucket.dtype is torch.float64
    rtol = 1e-12 if exact else 2 * MEASURED_RTOL
    torch.testing.assert_close(summary[0], want[0], rtol=rtol, atol=0)


def test_this_device_uses_triton():
    assert fastguard.backend_for(torch.zeros(1, device="cuda")) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0], ids=str)
@pytest.mark.parametrize("bad", [False, True], ids=["finite", "bad"])
def test_measure_against_the_reference(stages, dtype, norm_type, bad):
    grads = gradients(dtype, bad)
    check_measure(stages, grads, norm_type)
    check_measure(stages, grads, norm_type, list(range(len(grads))), len(grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_measure_at_any_magnitude(stages, dtype):
    for magnitude in (1e-40, 1e-30, 1e-25, 1e-19, 1.0, 1e18, 1e20, 1e37):
        x = (torch.randn(100_000, device="cuda").double() * magnitude).to(dtype)
        check_measure(stages, [x])
        check_measure(stages, [torch.full((70_000,), magnitude, device="cuda").to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiplier", [1.0, 0.3, 0.0, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("clean", [0.0, 1.0], ids=["keep", "clean"])
def test_apply_rounds_as_torch_does(stages, dtype, multiplier, clean):
    """Products are computed in float32 and rounded once, bit for bit, also for bf16.

    The test computes this product itself, because torch rounds a factor on the device to the dtype
    of the gradient before it multiplies. Only a factor on the CPU stays in float32."""
    grads = gradients(dtype, bad=True)
    want = []
    for g in grads:
        x = torch.where(g.isfinite(), g, 0.0) if clean else g
        factor = torch.tensor(multiplier, dtype=reference.factor_dtype(dtype), device="cuda")
        want.append(x.clone() if multiplier == 1.0 else (x.to(factor.dtype) * factor).to(dtype))
    factors = torch.tensor([multiplier], dtype=torch.float64, device="cuda")
    stages.apply(bucketize(grads).buckets[0], factors, torch.tensor(clean, device="cuda"))
    for grad, expected in zip(grads, want, strict=True):
        assert grad.dtype == expected.dtype
        torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", ["skip", "zero", "propagate"])
def test_decide_against_the_reference(stages, mode):
    device = torch.device("cuda")
    for n_segments in (1, 3, 2000):
        summary = torch.rand(4, n_segments, dtype=torch.float64, device=device)
        summary[1:] = 0
        for bad in (0.0, 1.0):
            summary[1, 0] = bad
            stats = GradStats(summary, torch.zeros(3, 1, dtype=torch.int64, device=device), 2.0)
            policy = Policy(torch.full((1,), 0.5, dtype=torch.float64, device=device), mode)
            arguments = (stats, Signals.none(device), None, policy)
            ours, theirs = stages.decide(*arguments), reference.decide(*arguments)
            for name in ("clip_coef", "multiplier", "found_inf", "clean", "reason", "total_norm"):
                a, b = getattr(ours, name), getattr(theirs, name)
                torch.testing.assert_close(a, b, rtol=1e-12, atol=0, equal_nan=True)


# The relative size of the last bit, and the smallest subnormal: a coefficient with an error of 1e-7
# may change the rounding of a product.
LAST_BIT = {
    torch.float16: (2.0**-10, 2.0**-24),
    torch.bfloat16: (2.0**-7, 0.0),
    torch.float32: (2.0**-22, 0.0),
    torch.float64: (1e-12, 0.0),
}
# torch rounds the norms of the tensors, their norm, the coefficient and the product to the dtype of
# the gradients. We round only the product. This gives five rounding errors of half a unit in the
# last place, doubled.
TORCH_IS_OFF = {
    torch.float16: (2.0**-8, 2.0**-23),
    torch.bfloat16: (2.0**-5, 0.0),
    torch.float32: (1e-4, 0.0),
    torch.float64: (1e-12, 0.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_grad_norm_against_the_formula_and_torch(dtype):
    ours = parameters_with(gradients(dtype))
    before = [p.grad.clone() for p in ours]
    theirs = parameters_with([g.clone() for g in before])
    norm = fastguard.clip_grad_norm_(ours, 1.0)
    true = torch.nn.utils.get_total_norm([g.double() for g in before])
    torch.testing.assert_close(norm.double(), true, rtol=NORM_RTOL, atol=0)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    coef = (1.0 / (true + 1e-6)).to(reference.factor_dtype(dtype))
    for a, b, g in zip(ours, theirs, before, strict=True):
        rtol, atol = LAST_BIT[dtype]
        exact = (g.to(coef.dtype) * coef).to(dtype)
        torch.testing.assert_close(a.grad, exact, rtol=rtol, atol=atol)
        rtol, atol = TORCH_IS_OFF[dtype]
        torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=atol)


def test_stages_do_not_wait(stages, no_sync):
    grads = gradients(torch.bfloat16, bad=True)
    half = torch.ones(1, dtype=torch.float64, device="cuda")
    clean = torch.zeros((), device="cuda")
    limit = half * 0.5
    with no_sync():
        for _ in range(3):
            grads = [g.clone() for g in grads]  # new addresses, so a table is built and uploaded
            bucket = bucketize(grads).buckets[0]
            summary, counts = stages.measure_bucket(bucket, 1, len(grads), 2.0)
            stats, signals = GradStats(summary, counts, 2.0), Signals.none(summary.device)
            verdict = stages.decide(stats, signals, None, Policy(limit, "zero"))
            stages.apply(bucket, verdict.multiplier, verdict.clean)
            stages.apply(bucket, half, clean)
    assert all(g.isfinite().all() for g in grads)


def test_a_graph_sees_new_gradients_at_the_same_addresses(stages):
    grads = gradients(torch.float32)
    bucket = bucketize(grads).buckets[0]
    half = torch.full((1,), 0.5, dtype=torch.float64, device="cuda")
    clean = torch.zeros((), device="cuda")

    def work():
        measured = stages.measure_bucket(bucket, 1, len(grads), 2.0)
        stages.apply(bucket, half, clean)
        return measured

    graph, (summary, counts) = captured(work)
    for value in (1.0, 3.0, math.nan):
        for g in grads:
            g.fill_(1.0)
        grads[-1].fill_(value)
        want, want_counts = reference.measure_bucket(bucket, 1, len(grads), 2.0)
        graph.replay()
        assert torch.equal(counts, want_counts)
        torch.testing.assert_close(summary, want, rtol=2 * MEASURED_RTOL, atol=0)
        assert grads[0].numel() == 0 and grads[1].item() == 0.5


def test_gradients_that_are_created_inside_a_graph(stages):
    """Their addresses are new at capture, so the graph itself uploads the table."""
    weight = torch.randn(1000, device="cuda", requires_grad=True)

    def step():
        (grad,) = torch.autograd.grad((weight * weight).sum(), weight)
        return stages.measure_bucket(bucketize([grad]).buckets[0], 1, 1, 2.0)[0], grad

    graph, (summary, grad) = captured(step)
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(summary[0, 0], grad.double().square().sum(), rtol=1e-7, atol=0)
        with torch.no_grad():
            weight.mul_(1.5)


def test_a_flat_bucket_in_a_graph_before_anything_else_and_on_other_streams(stages):
    """The bucket keeps its table from step to step, but not a table that a graph uploads."""
    # Compiles the kernels before the capture.
    check_measure(stages, [torch.randn(5, device="cuda")])
    parameters = [torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in (5, 4096)]
    (bucket,) = fastguard.FlatGradBuckets(parameters, trusted=True).buckets().buckets
    for p in parameters:
        p.grad.fill_(2.0)
    torch.cuda.synchronize()

    def power_sum():
        return stages.measure_bucket(bucket, 1, 2, 2.0)[0][0]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = power_sum()
    before_replay = power_sum()
    graph.replay()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        elsewhere = power_sum()
    torch.cuda.synchronize()
    for found in (captured, before_replay, elsewhere):
        assert found.item() == 4 * 4101


def test_streams_share_tables_and_results_agree(stages):
    grads = gradients(torch.float32)
    bucket = bucketize(grads).buckets[0]
    want = stages.measure_bucket(bucket, 1, len(grads), 2.0)[0]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(stages.measure_bucket(bucket, 1, len(grads), 2.0)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(r, want) for r in results)


def test_determinism_over_100_runs(stages):
    grads = [torch.randn(5_000_000, device="cuda"), torch.randn(777, device="cuda")]
    first = stages.measure_bucket(bucketize(grads).buckets[0], 1, 2, 2.0)[0]
    for run in range(100):
        if run % 10 == 5:
            grads = [g.clone() for g in grads]  # at other addresses
        again = stages.measure_bucket(bucketize(grads).buckets[0], 1, 2, 2.0)[0]
        assert torch.equal(first, again)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(stages):
    grads = [torch.randn(70_000, device="cuda:1")]
    check_measure(stages, grads)
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_records_of_a_device_that_is_not_the_current_one():
    p = torch.nn.Parameter(torch.zeros(2, device="cuda:1"))
    opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=1.0, fused=True), max_norm=1.0)
    for norm in (5.0, 10.0):
        p.grad = torch.tensor([0.6, 0.8], device="cuda:1") * norm
        with torch.cuda.device(1):
            torch.cuda._sleep(100_000_000)
        opt.step()
        (record,) = opt.flush()
        assert record.total_norm == pytest.approx(norm)


@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_gradients_of_a_gpu_and_of_the_host_together(home):
    """Each device waits for the values that it needs from the other one."""
    devices = [home, "cuda" if home == "cpu" else "cpu"]
    norm = math.sqrt(2 * 3.0**2 + 2 * 4.0**2)
    for _ in range(3):
        torch.cuda._sleep(100_000_000)
        grads = [torch.full((2,), x, device=d) for x, d in zip((3.0, 4.0), devices, strict=True)]
        parameters = parameters_with(grads)
        assert fastguard.clip_grad_norm_(parameters, 1.0).item() == pytest.approx(norm)
        for p, x in zip(parameters, (3.0, 4.0), strict=True):
            assert p.grad.tolist() == pytest.approx([x / norm] * 2)


def test_thousands_of_segments(stages):
    grads = [torch.randn(1 + i % 300, device="cuda") for i in range(3000)]
    check_measure(stages, grads, segments=range(3000), n_segments=3000)


def test_the_host_finishes_long_before_torch_does(stages):
    """This only checks that no launch is synchronous; benchmarks/gpu.py measures the time."""
    grads = [torch.randn(1000, device="cuda") for _ in range(2000)]
    bucket = bucketize(grads).buckets[0]
    stages.measure_bucket(bucket, 1, len(grads), 2.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about a tenth of a second of device time
    event = torch.cuda.Event()
    event.record()
    stages.measure_bucket(bucket, 1, len(grads), 2.0)
    assert not event.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", BAD_PATTERNS, ids=str)
def test_sums_of_whole_vectors_are_compensated(stages, dtype, monkeypatch):
    """Uses the code for GPUs with slow fp64; a compiler may fuse or reorder operations."""
    sum_whole_vectors(monkeypatch, dtype)
    pattern = torch.tensor(BAD_PATTERNS[dtype], device="cuda").to(dtype)
    randoms = (torch.randn(1_000_000, device="cuda") * 1.5).exp().to(dtype)
    for x in (pattern, pattern.repeat(100_000), randoms):
        bucket = bucketize([x]).buckets[0]
        power_sum = stages.measure_bucket(bucket, 1, 1, 2.0)[0][0, 0]
        true = x.double().square().sum()
        torch.testing.assert_close(power_sum, true, rtol=2 * KEPT_RTOL, atol=0)
