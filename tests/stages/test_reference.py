"""The reference implementation, which serves other devices, gives the same results on a CPU."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastguard.gradients.buckets import bucketize
from fastguard.stages import reference
from guardtest.grads import DTYPES


class Products(TorchDispatchMode):
    """Records the dtypes of the factors of all multiplications."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mul and args[0].is_floating_point():
            self.dtypes.append([arg.dtype for arg in args])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clean", [0.0, 1.0])
@pytest.mark.parametrize("multiplier", [1.0, 0.999, 0.3, 0.0])
def test_results_do_not_depend_on_reading_the_verdict(dtype, clean, multiplier):
    grad = torch.randn(1000).to(DTYPES[dtype])
    grad[[3, 500, 999]] = torch.tensor([math.nan, math.inf, -math.inf]).to(grad.dtype)
    expected = grad.clone()
    (bucket,) = bucketize([expected]).buckets
    scales, cleans = torch.tensor([multiplier], dtype=torch.float64), torch.tensor(clean)
    reference.apply(bucket, scales, cleans)
    reference._apply_to_tensor(grad, scales[0], cleans)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_coefficient_is_not_rounded_to_16_bits(dtype):
    # A GPU rounds a scalar to the dtype of the tensor that it multiplies: 0.999 would become 1.
    grad = torch.ones(4, dtype=DTYPES[dtype])
    with Products() as products:
        reference._apply_to_tensor(grad, torch.tensor(0.999, dtype=torch.float64), torch.zeros(()))
    assert products.dtypes  # one multiplication, or two for a tiny coefficient
    assert all(pair == [torch.float32, torch.float32] for pair in products.dtypes)
