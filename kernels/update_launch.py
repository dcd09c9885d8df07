"""Launches the update kernel: its variants, and the launches before and after it.

advance        step counts and coefficients of each tensor
lower_rates    with update clipping
update_kernel
combine        with statistics
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastguard.kernels import units
from fastguard.kernels.columns import COEFFICIENT_COLUMNS
from fastguard.kernels.elements import TRITON_DTYPES
from fastguard.kernels.formulas import advance_steps
from fastguard.kernels.launch import INTERPRETED, WARP, Launcher, Variant
from fastguard.kernels.tuning import PLAIN, Tuning, n_programs
from fastguard.kernels.update import update_kernel
from fastguard.kernels.update_chunks import THREADS
from fastguard.kernels.update_clipping import lower_rates
from fastguard.kernels.update_elements import MASTERS
from fastguard.kernels.update_statistics import combine, partials_of
from fastguard.kernels.update_table import Arrays, update_table_of

LONGEST_ROW = 2**16

_fused = Launcher(update_kernel, THREADS // WARP, max_registers=80)
_exact = Launcher(update_kernel, THREADS // WARP, max_registers=80, fuses=False)
# With units or statistics, there are two programs per multiprocessor. Three programs would leave 80
# registers per thread, and up to 24 registers would spill.
LARGE_TUNING = Tuning(
    units.PLAIN.block_bytes, num_warps=THREADS // WARP, programs=2, max_registers=128
)
_fused_large = Launcher(update_kernel, LARGE_TUNING.num_warps, LARGE_TUNING.max_registers)
_exact_large = Launcher(
    update_kernel, LARGE_TUNING.num_warps, LARGE_TUNING.max_registers, fuses=False
)


def update_arrays(
    arrays: Arrays,
    hyper: Tensor,
    multiplier: Tensor,
    clean: Tensor,
    found_inf: Tensor,
    algorithm: int,
    master: str | None,
    stochastic: bool,
    amsgrad: bool,
    nesterov: bool,
    reproducible: bool,
    spike_aware: bool = False,
    update_clipping: bool = False,
    limits: Tensor | None = None,
    propagates: bool = False,
    statistics: Tensor | None = None,
) -> Tensor | None:
    """Takes the step of T tensors, or changes nothing if it is skipped, without a sync.

    Args:
        arrays: The tensors; all but the gradients are written.
        hyper: float64 `(G, 12)`, contiguous: see `fastguard.optim.contract.HYPER`.
        multiplier: float64 `(S,)`, contiguous.
        clean, found_inf: float32 `()`.
        algorithm: A value of `ALGORITHMS`.
        master: `"float32"`, `"remainder"` or None.
        stochastic, amsgrad, nesterov, reproducible, spike_aware, update_clipping: See
            `fastguard.optim.contract.Update`.
        limits: float64 `(3,)`: clip_factor, eps and the inverse of the loss scale, for the units in
            `arrays.rows`; None: units are not clipped.
        propagates: See `fastguard.stages.reference_units.unit_coefs`.
        statistics: float64 `(T, 3)`, contiguous: see `fastguard.optim.contract.Update`; None: no
            statistics are computed.

    Returns:
        float64 `(P, 4)`: for each program, the smallest coefficient of a unit, the number of
        clipped units, and for the unit with the smallest coefficient, the index of its tensor and
        its index in that tensor; `(1, 0, 0, 0)` for a skipped step. None without limits or without
        elements.
    """
    weights, device = arrays.weights, hyper.device
    is_large = limits is not None or statistics is not None
    programs = n_programs(device, LARGE_TUNING if is_large else PLAIN)
    table = update_table_of(arrays, programs)
    layout = table.layout
    coefficients = torch.empty(
        len(weights), COEFFICIENT_COLUMNS.value, dtype=torch.float64, device=device
    )
    advance_steps(
        layout.tensors, table.addresses, hyper, found_inf, coefficients, algorithm,
        len(arrays.steps) > 0, stochastic, spike_aware, update_clipping,
    )  # fmt: skip
    if not layout.n_chunks:
        return None
    if update_clipping:
        lower_rates(
            table, coefficients, multiplier, clean, found_inf, arrays, programs, spike_aware,
            reproducible,
        )  # fmt: skip
    launch = variant_of(
        device, algorithm, weights[0].dtype, arrays.gradients[0].dtype,
        tuple(state[0].dtype for state in arrays.states), master, stochastic, amsgrad, nesterov,
        reproducible, spike_aware, limits is not None, propagates, statistics is not None,
    )  # fmt: skip
    n = min(programs, layout.n_chunks)
    clipped = None if limits is None else torch.empty(n, 4, dtype=torch.float64, device=device)
    of_units = (coefficients, coefficients) if limits is None else (limits, clipped)
    partials = coefficients if statistics is None else partials_of(layout.n_chunks, device)
    pointers = (
        layout.chunks, layout.tensors, table.addresses, coefficients, multiplier, clean, found_inf,
        *of_units, partials,
    )  # fmt: skip
    launch(n, pointers, layout.n_chunks)
    if statistics is not None:
        combine(partials, layout.tensors, found_inf, statistics)
    return clipped


@functools.lru_cache(maxsize=256)
def variant_of(
    device: torch.device,
    algorithm: int,
    parameter: torch.dtype,
    gradient: torch.dtype,
    states: tuple[torch.dtype, ...],
    master: str | None,
    stochastic: bool,
    amsgrad: bool,
    nesterov: bool,
    reproducible: bool,
    spike_aware: bool,
    clips_units: bool,
    propagates: bool,
    statistics: bool,
) -> Variant:
    """Returns the kernel for dtypes and options."""
    constants = constants_of(
        algorithm, parameter, gradient, states, master, stochastic, amsgrad, nesterov,
        reproducible, spike_aware, clips_units, propagates, statistics,
    )  # fmt: skip
    return launcher_of(reproducible, clips_units or statistics).variant(device, **constants)


def launcher_of(reproducible: bool, is_large: bool = False) -> Launcher:
    """Returns the launcher with or without fused multiply-adds, and for `LARGE_TUNING`."""
    if is_large:
        return _exact_large if reproducible else _fused_large
    return _exact if reproducible else _fused


def vector_size(
    parameter: torch.dtype,
    gradient: torch.dtype,
    states: tuple[torch.dtype, ...],
    master: str | None,
) -> int:
    """Returns the number of elements per thread and array: 16 bytes of the widest array."""
    widest = max(dtype.itemsize for dtype in (parameter, gradient, *states))
    return 16 // max(widest, {None: 0, "float32": 4, "remainder": 2}[master])


def constants_of(
    algorithm: int,
    parameter: torch.dtype,
    gradient: torch.dtype,
    states: tuple[torch.dtype, ...],
    master: str | None,
    stochastic: bool,
    amsgrad: bool,
    nesterov: bool,
    reproducible: bool,
    spike_aware: bool = False,
    clips_units: bool = False,
    propagates: bool = False,
    statistics: bool = False,
) -> dict[str, Any]:
    """Returns the constants of the kernel, in order."""
    a, b, c = (*states, *(3 - len(states)) * (parameter,))
    vec = vector_size(parameter, gradient, states, master)
    return {
        "PARAM": TRITON_DTYPES[parameter],
        "GRAD": TRITON_DTYPES[gradient],
        "A": TRITON_DTYPES[a],
        "B": TRITON_DTYPES[b],
        "C": TRITON_DTYPES[c],
        "ALGORITHM": algorithm,
        "N_STATES": len(states),
        "MASTER_KIND": MASTERS[master],
        "STOCHASTIC": stochastic,
        "AMSGRAD": amsgrad,
        "NESTEROV": nesterov,
        "REPRODUCIBLE": reproducible,
        "SPIKES": spike_aware,
        "UNITS": clips_units,
        "STATISTICS": statistics,
        "PROPAGATES": propagates,
        "EXACT_BF16": INTERPRETED,
        "BLOCK_SIZE": THREADS * vec,
        "VEC": vec,
    }
