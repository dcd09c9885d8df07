"""The update of the elements of one tensor: loads, the formula of the algorithm, and stores.

Everything is inlined into the kernel of `update`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastguard.kernels.elements import as_arithmetic
from fastguard.kernels.formulas import new_values, without_spikes
from fastguard.kernels.rounding import noise_at, stored, weight_and_remainder, weight_of_parts
from fastguard.kernels.update_chunks import scaled

NO_MASTER, FLOAT32_MASTER, REMAINDER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MASTERS: dict[str | None, int] = {None: 0, "float32": 1, "remainder": 2}


@triton.jit
def update_elements(
    p_ptr, g_ptr, a_ptr, b_ptr, c_ptr, x_ptr, at, mask, first_counter, key, clean, scale, factor,
    threshold, reset,
    c0, c1, c2, c3, c4, c5, c6, c7,
    PARAM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    ALGORITHM: tl.constexpr, N_STATES: tl.constexpr, MASTER_KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr, AMSGRAD: tl.constexpr, NESTEROV: tl.constexpr,
    REPRODUCIBLE: tl.constexpr, SPIKES: tl.constexpr, EXACT_BF16: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Updates the elements `at` of a tensor.

    Returns the old and the new exact weights, in the dtype of the arithmetic, and the weights that
    were stored.
    """
    g = as_arithmetic(tl.load(g_ptr + at, mask=mask, other=0.0), ARITHMETIC)
    if MASTER_KIND == FLOAT32_MASTER:
        p = tl.load(x_ptr + at, mask=mask, other=0.0)
    elif MASTER_KIND == REMAINDER:
        upper = tl.load(p_ptr + at, mask=mask, other=0.0)
        p = weight_of_parts(upper, tl.load(x_ptr + at, mask=mask, other=0))
    else:
        p = as_arithmetic(tl.load(p_ptr + at, mask=mask, other=0.0), ARITHMETIC)
    old = p
    a, b, c = g, g, g
    if N_STATES > 0:
        a = as_arithmetic(tl.load(a_ptr + at, mask=mask, other=0.0), ARITHMETIC)
    if N_STATES > 1:
        b = as_arithmetic(tl.load(b_ptr + at, mask=mask, other=0.0), ARITHMETIC)
    if N_STATES > 2:
        c = as_arithmetic(tl.load(c_ptr + at, mask=mask, other=0.0), ARITHMETIC)
    g = scaled(g, clean, scale, factor)
    if SPIKES:
        a = tl.where(reset, 0.0, a)
        b = tl.where(reset, 0.0, b)
        c = tl.where(reset, 0.0, c)
        g = without_spikes(g, b, threshold, REPRODUCIBLE, ARITHMETIC)
    p, a, b, c = new_values(
        p, g, a, b, c, c0, c1, c2, c3, c4, c5, c6, c7,
        ALGORITHM, N_STATES, AMSGRAD, NESTEROV, REPRODUCIBLE, ARITHMETIC,
    )  # fmt: skip
    noise = at
    if STOCHASTIC:
        noise = noise_at(first_counter, at, key)
    if N_STATES > 0:
        tl.store(a_ptr + at, stored(a, noise, A, 1, STOCHASTIC, EXACT_BF16), mask=mask)
    if N_STATES > 1:
        tl.store(b_ptr + at, stored(b, noise, B, 2, STOCHASTIC, EXACT_BF16), mask=mask)
    if N_STATES > 2:
        tl.store(c_ptr + at, stored(c, noise, C, 3, STOCHASTIC, EXACT_BF16), mask=mask)
    if MASTER_KIND == FLOAT32_MASTER:
        parameter = stored(p, noise, PARAM, 0, False, EXACT_BF16)
        tl.store(x_ptr + at, p, mask=mask)
    elif MASTER_KIND == REMAINDER:
        parameter, lower = weight_and_remainder(p)
        tl.store(x_ptr + at, lower, mask=mask)
    else:
        parameter = stored(p, noise, PARAM, 0, STOCHASTIC, EXACT_BF16)
        p = as_arithmetic(parameter, ARITHMETIC)
    tl.store(p_ptr + at, parameter, mask=mask)
    return old, p, parameter
