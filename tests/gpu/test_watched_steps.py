"""Watched steps on a GPU give the results of the reference, bit for bit, and do not wait."""

import math

import pytest
import torch

from fastguard import GuardedOptimizer
from fastguard.gradients.buckets import bucketize
from fastguard.stages import reference
from guardtest.graphs import captured

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [1, 7, 4097, 70_001, 2_000_003]
EVERYTHING = ("tensor_norms", "update_ratio", "underflow")


def tensors(dtype, seed=0):
    """Returns tensors with zeros of both signs, NaN, and magnitudes down to subnormals."""
    torch.manual_seed(seed)
    made = []
    for n in SIZES:
        scale = 2.0 ** torch.randint(-160, 20, (n,))
        t = (torch.randn(n, dtype=torch.float64) * scale).to(dtype)
        t[::5], t[2::7], t[3::1001] = 0.0, -0.0, math.nan
        made.append(t.cuda())
    made.append(torch.randn(64, 3, 7, 7, device="cuda").to(dtype))
    made[-1] = made[-1].to(memory_format=torch.channels_last)
    return made


def bucket_of(given):
    n = len(given)
    return bucketize(given, segments=range(n), n_segments=n).buckets[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
def test_bits(stages, dtype, wanted):
    bucket = bucket_of(tensors(dtype))
    n = len(bucket.grads)
    found = stages.read_bits(bucket, n, *wanted)
    expected = reference.read_bits(bucket, n, *wanted)
    assert torch.equal(found, stages.read_bits(bucket, n, *wanted))
    if wanted[0]:
        assert torch.equal(found[:n], expected[:n])
    if wanted[1]:
        assert found[n].item() % 2**32 == expected[n].item() % 2**32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 9, 100_001])
def test_exponents(stages, dtype, stride):
    bucket = bucket_of(tensors(dtype))
    for scale in (None, torch.tensor(2.0**-20 / 3, dtype=torch.float64, device="cuda")):
        found = stages.count_exponents(bucket, stride, scale)
        assert torch.equal(found, reference.count_exponents(bucket, stride, scale))


def test_a_graph_reads_new_gradients(stages):
    given = tensors(torch.float32)
    bucket = bucket_of(given)
    n = len(given)

    def read():
        return stages.read_bits(bucket, n, True, True), stages.count_exponents(bucket, 9)

    graph, (bits, counts) = captured(read)
    for seed in (1, 2):
        for t, new in zip(given, tensors(torch.float32, seed), strict=True):
            t.copy_(new)
        graph.replay()
        expected = reference.read_bits(bucket, n, True, True)
        assert torch.equal(bits[:n], expected[:n])
        assert (bits[n] - expected[n]).item() % 2**32 == 0
        assert torch.equal(counts, reference.count_exponents(bucket, 9))


def guarded(device, **options):
    ps = [torch.nn.Parameter(torch.ones(n, device=device)) for n in (3, 4097, 70_000)]
    inner = torch.optim.AdamW(ps, lr=0.01, fused=True)
    return GuardedOptimizer(inner, watch=EVERYTHING, watch_every=1, **options), ps


def give(ps, step):
    for i, p in enumerate(ps):
        generator = torch.Generator().manual_seed(10 * step + i)
        grad = torch.randn(p.shape, generator=generator) * 2.0 ** (-7 * i)
        grad[::3] = 0.0
        p.grad = grad.to(p.device)


@pytest.mark.parametrize("options", [{}, {"clip_scope": "tensor"}, {"flat_buckets": True}], ids=str)
def test_a_watched_step_does_not_wait_and_has_the_record_of_a_cpu(no_sync, options):
    (opt, ps), (twin, others) = guarded("cuda", **options), guarded("cpu", **options)
    give(ps, 0)
    opt.step()
    with no_sync():
        for step in range(1, 4):
            for p in ps:
                p.grad = None if step == 2 and p is ps[0] else torch.full_like(p, 0.5 * step)
            opt.step()
    opt.flush()
    opt, ps = guarded("cuda", **options)
    for step in range(3):
        give(ps, step)
        give(others, step)
        opt.step()
        twin.step()
    for record, other in zip(opt.flush(), twin.flush(), strict=True):
        for name in ("zero_share", "underflow"):
            assert record.watch[name] == other.watch[name]
        for name in ("tensor_norms", "update_ratio"):
            assert record.watch[name] == pytest.approx(other.watch[name], rel=1e-5)
