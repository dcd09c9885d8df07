"""`sanitize_grads_` and `measure_grads`."""

import math

import pytest
import torch
from torch import nn

import fastguard
from guardtest.grads import NORM_TYPES, parameters, true_norm

NAN, INF = math.nan, math.inf


# sanitize_grads_ and measure_grads.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sanitize_replaces_and_reports(dtype):
    grad = torch.tensor([NAN, 2.0, INF, -INF, NAN]).to(dtype)
    stats = fastguard.sanitize_grads_([("w", parameters(grad)[0])])
    assert grad.tolist() == [0.0, 2.0, 0.0, 0.0, 0.0]
    assert stats.culprits() == [("w", 2, 1, 1)]
    assert stats.total_norm == 2.0 and stats.found_nonfinite == 1.0


def test_sanitize_with_other_values():
    grads = [torch.tensor([NAN, 2.0, INF, -INF]), torch.tensor([NAN]).half()]
    fastguard.sanitize_grads_(parameters(*grads), nan=0.5, posinf=9, neginf=-8.0)
    assert [g.tolist() for g in grads] == [[0.5, 2.0, 9.0, -8.0], [0.5]]


def test_sanitize_cleans_each_part_of_a_complex_number():
    grad = torch.tensor([complex(NAN, 2.0), complex(1.0, INF)])
    stats = fastguard.sanitize_grads_(parameters(grad))
    assert grad.tolist() == [2j, 1 + 0j]
    assert stats.culprits() == [("parameter 0", 1, 1, 0)]


def test_sanitize_does_not_touch_clean_gradients():
    grad = torch.tensor([-0.0, 1.0])
    stats = fastguard.sanitize_grads_(parameters(grad))
    assert grad._version == 0
    assert stats.found_nonfinite == 0.0 and stats.culprits() == []


def test_measure_grads_of_a_model():
    model = nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, INF]])
    stats = fastguard.measure_grads(model.named_parameters())
    assert stats.total_norm == 3.0
    assert stats.power_sum.shape == (1,) and stats.nan_count.shape == (2,)
    assert stats.culprits() == [("weight", 0, 1, 0)]
    assert model.weight.grad._version == 0


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_measure_grads_per_tensor(norm_type):
    grads = [torch.randn(5), None, torch.randn(3).double(), torch.tensor([NAN, 2.0])]
    stats = fastguard.measure_grads(parameters(*grads), norm_type=norm_type, per_tensor=True)
    norms = [0.0 if g is None else true_norm([g], norm_type) for g in grads]
    assert stats.segment_norms.tolist() == pytest.approx(norms, rel=1e-12)
    assert stats.segment_counts.tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4]
    present = [g for g in grads if g is not None]
    assert stats.total_norm.item() == pytest.approx(true_norm(present, norm_type), rel=1e-12)
