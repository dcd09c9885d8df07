"""Every tolerance of the test suite, each with its reason."""

import torch

NORM_RTOL = 1e-7
"""An L2 norm compared with float64: the documented accuracy, about one rounding to float32."""

MEASURED_RTOL = 4e-8
"""An L2 norm before it is rounded to float32 (6e-8), so that it stays within NORM_RTOL."""

KEPT_RTOL = 7e-10
"""An L2 norm from compensated float32 sums: 11 * 2^-34, see kernels/measure.py."""

INTERPRETER_BF16_RTOL = 2.0**-7
"""bf16 stores truncate in Triton's interpreter and round on a GPU: the last bit may differ."""

COMPILED_RTOL = 1e-4
"""A weight after some compiled updates: bias corrections are in float32 instead of Python's
float64, and `1 - beta2 ** step` of a first step loses three digits."""


def scale_rtol(dtype: torch.dtype) -> float:
    """Tolerance of a clipped gradient: one rounding of the coefficient and one of the product."""
    return 2 * torch.finfo(dtype).eps
