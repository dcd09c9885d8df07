"""Stage 1: `GradStats` for segments, dtypes, norm types and scaled gradients."""

import math

import pytest
import torch

from fastguard.gradients.buckets import bucketize
from fastguard.gradients.tensor_kinds import PLAIN
from fastguard.stages import backend, reference
from fastguard.stages.cpu.measure import measure_bucket as measure_on_cpu
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure, norm_type_of
from guardtest.grads import true_norm
from guardtest.tolerances import MEASURED_RTOL

NAN, INF = math.nan, math.inf


@pytest.fixture(params=["cpu", "plain"])
def each_backend(request, monkeypatch):
    """The CPU backend, and the reference for devices without kernels."""
    if request.param == "plain":
        monkeypatch.setattr(backend, "stages", lambda device, kind=PLAIN: reference)


def stats_of(*grads, **how) -> GradStats:
    norm_type = how.pop("norm_type", 2.0)
    inv_scale = how.pop("inv_scale", None)
    return measure(bucketize(grads, norm_type=norm_type, **how), norm_type, inv_scale)


@pytest.mark.usefixtures("each_backend")
def test_the_fields_of_a_small_model():
    stats = stats_of(
        torch.tensor([3.0, NAN]),
        None,
        torch.tensor([[INF, -INF], [INF, 4.0]]),
        names=["a", "b", "c"],
    )
    assert stats.power_sum.tolist() == [25.0]
    assert stats.segment_counts.tolist() == [[1.0], [2.0], [1.0]]
    assert stats.nan_count.tolist() == [1, 0, 0]
    assert stats.posinf_count.tolist() == [0, 0, 2]
    assert stats.neginf_count.tolist() == [0, 0, 1]
    assert stats.total_norm == 5.0 and stats.total_norm.shape == ()
    assert stats.found_nonfinite == 1.0 and stats.found_nonfinite.dtype is torch.float32
    assert stats.culprits() == [("a", 1, 0, 0), ("c", 0, 2, 1)]


@pytest.mark.usefixtures("each_backend")
def test_dtypes_of_the_fields():
    stats = stats_of(torch.ones(2), torch.ones(2).half())
    assert stats.power_sum.dtype is torch.float64
    assert stats.counts.dtype is torch.int64
    assert stats.total_norm.dtype is torch.float32
    assert stats.total_norm64.dtype is torch.float64
    assert stats_of(torch.ones(2), torch.ones(2).double()).total_norm.dtype is torch.float64


def test_unnamed_culprits_have_the_numbers_of_the_caller():
    assert stats_of(None, torch.ones(1), torch.tensor([NAN])).culprits() == [
        ("parameter 2", 1, 0, 0)
    ]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
def test_nothing_to_measure(norm_type):
    for grads in ([], [None, None], [torch.empty(0)]):
        stats = stats_of(*grads, norm_type=norm_type)
        assert stats.total_norm == 0.0 and stats.total_norm.dtype is torch.float32
        assert stats.found_nonfinite == 0.0
        assert stats.counts.shape == (3, len(grads))
        assert stats.culprits() == []
    assert stats_of(norm_type=norm_type, n_segments=0).total_norm == 0.0


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(
    ("norm_type", "sums", "total"),
    [
        (2.0, [9.0, 41.0, 0.0], math.sqrt(50)),
        (1.0, [3.0, 9.0, 0.0], 12.0),
        (INF, [3.0, 5.0, 0.0], 5),
    ],
)
def test_segments_across_dtypes(norm_type, sums, total):
    stats = stats_of(
        torch.tensor([3.0]),
        torch.tensor([-4.0]).half(),
        torch.tensor([5.0, INF], dtype=torch.float64),
        segments=[0, 1, 1],
        n_segments=3,
        norm_type=norm_type,
    )
    assert stats.power_sum.tolist() == sums
    roots = [s ** (1 / norm_type) if norm_type != INF else s for s in sums]
    assert stats.segment_norms.tolist() == pytest.approx(roots)
    assert stats.total_norm64.item() == pytest.approx(total)
    assert stats.segment_counts.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, INF])
def test_stats_describe_the_unscaled_gradients(norm_type):
    grad = torch.randn(1000)
    scaled = stats_of(grad * 1024, norm_type=norm_type, inv_scale=torch.tensor(1 / 1024))
    assert scaled.total_norm64.item() == pytest.approx(true_norm([grad], norm_type), rel=1e-7)


@pytest.mark.usefixtures("each_backend")
def test_measuring_changes_nothing():
    grad = torch.tensor([1.0, NAN, -INF])
    before = grad.clone()
    stats_of(grad, inv_scale=torch.tensor(0.5))
    assert torch.equal(grad.view(torch.int32), before.view(torch.int32))
    assert grad._version == 0


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, INF])
def test_both_backends_agree(norm_type):
    grads = [torch.randn(n).to(d) for n in (0, 1, 900) for d in (torch.half, torch.float64)]
    grads[2][0], grads[5][7] = INF, NAN
    buckets = bucketize(grads, segments=[0, 1, 1, 0, 2, 2], n_segments=3)
    for bucket in buckets.buckets:
        tuned = measure_on_cpu(bucket, 3, 6, norm_type)
        plain = reference.measure_bucket(bucket, 3, 6, norm_type)
        torch.testing.assert_close(tuned[0], plain[0], rtol=MEASURED_RTOL, atol=0)
        assert torch.equal(tuned[1], plain[1])


def test_a_total_whose_square_overflows():
    grads = [torch.full((10,), 1e154, dtype=torch.float64) for _ in range(20)]
    stats = stats_of(*grads, segments=range(20), n_segments=20)
    assert stats.total_norm.item() == pytest.approx(1e154 * 200**0.5, rel=1e-12)
    assert stats.power_sum.tolist() == pytest.approx([1e309] * 20)
    assert stats.found_nonfinite == 0.0


@pytest.mark.parametrize("value", [2, "2", torch.tensor(2.0)])
def test_norm_types_are_numbers(value):
    assert norm_type_of(value) == float(value)


def test_the_inf_norm_has_torchs_names():
    assert norm_type_of("inf") == norm_type_of(INF) == INF


@pytest.mark.parametrize("value", [0, -1.0, NAN, -INF, "0", 10**400])
def test_an_invalid_norm_type_is_refused(value):
    with pytest.raises(ValueError, match=r"norm_type=.* use .*float\('inf'\)"):
        norm_type_of(value)


@pytest.mark.parametrize("value", [None, "two", True, [2.0, 1.0], torch.ones(2), 1j])
def test_a_norm_type_that_is_not_a_number_is_refused(value):
    with pytest.raises(TypeError, match=r"norm_type=.* is not a number.*; use 2\.0"):
        norm_type_of(value)


@pytest.mark.usefixtures("each_backend")
def test_counts_have_their_own_memory():
    """A collective writes into them."""
    grads = [torch.ones(3), torch.ones(4)]
    for stats in (stats_of(*grads), stats_of(*grads, segments=[0, 1], n_segments=2)):
        for counts in (stats.counts, stats.summary):
            assert counts.is_contiguous()
        stats.nan_count[0] = 5
        assert stats.counts.tolist() == [[5, 0], [0, 0], [0, 0]]
    assert stats_of(*grads).counts.sum() == 0
