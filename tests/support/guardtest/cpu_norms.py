"""Compares norms of the CPU backend with float64, and scales its fast path down for tests."""

import contextlib
import math
import threading

import pytest
import torch
from torch import Tensor

from fastguard.gradients import vectors
from fastguard.gradients.buckets import bucketize
from fastguard.stages.cpu import l2_blocks, l2_sums
from fastguard.stages.cpu import measure as cpu_measure
from fastguard.stages.formulas import holds_norms
from guardtest.grads import true_norm
from guardtest.tolerances import MEASURED_RTOL

BELOW_FLOAT64 = ("fp16", "bf16", "fp32")
NONFINITE = (math.nan, math.inf, -math.inf)

# A float32 norm of 256 times the one is 3.1e-7 too long, of the other 3.1e-7 too short: the worst
# that there are with eight additions at a time.
LONG, SHORT = 1.1553386449813843, 1.1599067449569702

SMALL = {
    "ROW": 8,
    "BLOCK": 64,
    "ALONE": 100,
    "LARGE": 256,
    "STAGE": 1024,
    "WIDE": 255,
    "JOINED": 511,
    "FEW": 64,
    "SHARE": 4096,
    "EXACT_BELOW": 64,
}


def norm_of(tensors: list[Tensor], norm_type: float = 2.0) -> float:
    """Returns the measured norm; checks that no element was counted as non-finite."""
    (bucket,) = bucketize(tensors, norm_type=norm_type).buckets
    (measured,), bad = cpu_measure.power_sums(bucket, 1, norm_type)
    assert bad == {}
    return root_of(measured, bucket.dtype, norm_type)


def root_of(measured: float, dtype: torch.dtype, norm_type: float) -> float:
    """The norm from the result of `power_sums` for gradients of this dtype."""
    if norm_type == math.inf or holds_norms(dtype, norm_type):
        return measured
    return measured ** (1.0 / norm_type)


def assert_norm_is_true(*tensors: Tensor, norm_type: float = 2.0) -> None:
    expected = true_norm(tensors, norm_type)
    assert norm_of(list(tensors), norm_type) == pytest.approx(expected, rel=MEASURED_RTOL, abs=0)


def blocks(values: Tensor, length: int) -> Tensor:
    """A vector that repeats each value `length` times."""
    return values[:, None].expand(-1, length).reshape(-1)


@contextlib.contextmanager
def scaled_down(monkeypatch):
    """Runs the fast path with the sizes of SMALL."""
    with monkeypatch.context() as patch:
        for name, value in SMALL.items():
            for module in (l2_blocks, l2_sums):
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        patch.setattr(vectors, "_local", threading.local())  # uses separate buffers
        yield


def edges() -> list[int]:
    """Sizes around those at which the scaled-down fast path uses another branch."""
    near = {n + d for n in SMALL.values() for d in (-1, 0, 1)}
    return sorted(near | {2 * SMALL["SHARE"] + 17})
