"""The power sums of any list of tensors agree with their definition."""

import math

import hypothesis
import torch
from hypothesis import strategies as st

from fastguard.gradients.buckets import bucketize
from fastguard.stages import reference
from fastguard.stages.cpu.measure import measure_bucket as measure_on_cpu
from guardtest.cpu_norms import NONFINITE, edges, scaled_down
from guardtest.grads import DTYPES
from guardtest.tolerances import MEASURED_RTOL


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
def test_power_sums_agree_with_their_definition(monkeypatch, case, norm_type):
    tensors, segments, n_segments = case
    (bucket,) = bucketize(tensors, segments=segments, n_segments=n_segments).buckets
    plain, plain_counts = reference.measure_bucket(bucket, n_segments, len(tensors), norm_type)
    with scaled_down(monkeypatch):
        summary, counts = measure_on_cpu(bucket, n_segments, len(tensors), norm_type)
    assert torch.equal(counts, plain_counts)
    assert torch.equal(summary[1:], plain[1:])
    torch.testing.assert_close(summary[0], plain[0], rtol=2 * MEASURED_RTOL, atol=0)
