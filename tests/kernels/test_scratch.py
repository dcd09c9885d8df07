"""The scratch of `measure` is zero between launches and dropped after a failure."""

import math

import pytest
import torch

from fastguard.gradients.buckets import bucketize
from fastguard.kernels import measure, scratch
from fastguard.kernels.summary import REDUCE_SIZE
from fastguard.stages import triton as triton_stages

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(scratch, "_kept", {})


def measured(grads, n_segments):
    n = len(grads)
    segments = [i % n_segments for i in range(n)]
    bucket = bucketize(grads, segments=segments, n_segments=n_segments).buckets[0]
    return triton_stages.measure_bucket(bucket, n_segments, n, 2.0)


@pytest.mark.parametrize("n_segments", [1, 3])
def test_a_bad_step_does_not_affect_the_next(n_segments):
    """Lists of other sizes use another layout of counts in the same memory."""
    bad = [torch.randn(n) for n in (5, 9000, 7, 600)]
    bad[1][8000] = math.nan
    bad[3][2] = math.inf
    bad[3][3] = -math.inf
    summary, counts = measured(bad, n_segments)
    assert counts.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    (kept,) = scratch._kept.values()
    assert not kept.zeros.any()
    for sound in ([torch.randn(8)], [torch.randn(30) for _ in range(3)]):
        summary, counts = measured(sound, 1)
        assert not counts.any() and not summary[1:].any()
        assert next(iter(scratch._kept.values())) is kept  # large enough, so reused


def test_counts_of_more_tensors_than_fit_in_a_block():
    n = REDUCE_SIZE // 3 + 2
    grads = [torch.randn(3) for _ in range(n)]
    grads[0][0] = grads[-1][2] = math.nan
    for n_segments in (1, 2, n):
        _, counts = measured(grads, n_segments)
        assert counts[0].nonzero().flatten().tolist() == [0, n - 1] and counts.sum() == 2
        assert not next(iter(scratch._kept.values())).zeros.any()


def test_a_longer_list_gets_a_larger_scratch():
    measured([torch.randn(3)], 1)
    (small,) = scratch._kept.values()
    measured([torch.randn(3) for _ in range(50)], 50)
    (large,) = scratch._kept.values()
    assert large.zeros.numel() > small.zeros.numel()


def test_after_a_failure_between_two_launches_the_scratch_is_not_kept(monkeypatch):
    """The first launch has written counts, which the second launch would have reset."""
    bad = [torch.full((9,), math.nan), torch.randn(4)]
    reduce = measure.reduce_segments

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "reduce_segments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(bad, 2)
    monkeypatch.setattr(measure, "reduce_segments", reduce)
    assert not scratch._kept
    _, counts = measured([torch.randn(9), torch.randn(4)], 2)
    assert not counts.any()


def test_streams_and_graphs_have_their_own_scratch(monkeypatch):
    stream, capturing = 1, False
    monkeypatch.setattr(scratch, "raw_stream_of", lambda: lambda index: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        scratch,
        "_made",
        lambda device, n, m, key: scratch.Scratch(torch.zeros(n), torch.zeros(m), key),
    )
    device = torch.device("cuda", 0)

    def one():
        own = scratch.take(device, 5, 5)
        scratch.keep(own)
        return own

    first = one()
    stream = 2
    second = one()
    assert second is not first and one() is second
    capturing = True
    assert one() is not second and len(scratch._kept) == 2
    capturing, stream = False, 1
    assert one() is first
