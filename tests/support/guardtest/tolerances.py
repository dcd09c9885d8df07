"""Every tolerance of the test suite, each with its reason."""

import torch

NORM_RTOL = 1e-7
"""An L2 norm against float64: the documented accuracy, about one rounding to float32 (6e-8)."""

MEASURED_RTOL = 4e-8
"""The same norm before it is rounded to float32 (6e-8), so that it stays within NORM_RTOL."""

KEPT_RTOL = 7e-10
"""The same for compensated float32 sums: 11 * 2^-34, see kernels/measure.py."""

INTERPRETER_BF16_RTOL = 2.0**-7
"""bf16 stores in triton's interpreter truncate where a GPU rounds: the last bit may differ."""

COMPILED_RTOL = 1e-4
"""A weight after some compiled updates: bias corrections are in float32 instead of Python's
float64, and `1 - beta2 ** step` of a first step loses three digits."""


def scale_rtol(dtype: torch.dtype) -> float:
    """Tolerance of a clipped gradient: one rounding of the coefficient and one of the product."""
    return 2 * torch.finfo(dtype).eps
