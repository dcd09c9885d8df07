"""Every tolerance of the test suite, each with its reason."""

import torch

NORM_RTOL = 1e-7
"""An L2 norm against float64: what the library promises, about one rounding to float32 (6e-8)."""

MEASURED_RTOL = 4e-8
"""The same norm while it is float64: rounding it to float32 (6e-8) keeps it under NORM_RTOL."""

KEPT_RTOL = 7e-10
"""The same where sums in float32 keep what they round off: 11 * 2^-34, see kernels/measure.py."""

INTERPRETER_BF16_RTOL = 2.0**-7
"""bf16 stores in triton's interpreter truncate where a GPU rounds: the last bit may differ."""

COMPILED_RTOL = 1e-4
"""A weight after some compiled updates: bias corrections are in float32 in place of Python's
float64, and `1 - beta2 ** step` of a first step loses three digits."""


def scale_rtol(dtype: torch.dtype) -> float:
    """A gradient times a clip coefficient: one rounding of the coefficient, one of the product."""
    return 2 * torch.finfo(dtype).eps
