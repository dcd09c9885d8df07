"""Elementwise clamps and replacements of gradients."""

import math

import pytest
import torch

from fastguard.gradients.buckets import bucketize
from fastguard.gradients.elementwise import clamp_, clamp_finite_
from guardtest.grads import DTYPES, assert_bitwise_equal

NAN, INF = math.nan, math.inf
YES = torch.ones(())


@pytest.mark.parametrize("inv_scale", [None, 0.25])
def test_clamping_keeps_nan_and_inf(inv_scale):
    unit = 1.0 if inv_scale is None else 1 / inv_scale
    grad = torch.tensor([0.5, 3.0, -7.0, NAN, INF, -INF]) * unit
    clamp_finite_([grad], 2.0, None if inv_scale is None else torch.tensor(inv_scale))
    expected = [0.5 * unit, 2.0 * unit, -2.0 * unit, NAN, INF, -INF]
    assert grad.tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [1e6, 1e39, 1e300, INF])
def test_a_limit_beyond_the_range_of_a_dtype_clamps_nothing(dtype, limit):
    largest = torch.finfo(DTYPES[dtype]).max
    values = torch.tensor([1.0, largest, -largest, INF, -INF, NAN], dtype=DTYPES[dtype])
    clamped = values.clamp(-limit, limit) if limit <= largest else values
    grad = values.clone()
    clamp_(bucketize([grad]), limit)
    assert_bitwise_equal(grad, clamped)
    finite = torch.cat([clamped[:3], values[3:]])
    for inv_scale in (None, YES):
        if inv_scale is YES and dtype == "fp64":
            continue  # the scaler computes in float32
        grad = values.clone()
        clamp_finite_([grad], limit, inv_scale)
        assert_bitwise_equal(grad, finite)
