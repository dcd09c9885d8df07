"""Launching a kernel with as little host work as Triton allows.

The first launch of a variant (dtype, norm, device, ...) goes through Triton's JIT, which compiles
it; later ones call the `CompiledKernel` that it returned: 1.2 µs of host time in place of 5.9. That
is sound because no argument of our kernels is specialized on its value or alignment, so that one
variant is right for every call. Pointers are passed as plain integers, which spares a driver query
for each."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs kernels on the CPU (`TRITON_INTERPRET=1`), as the tests do."""

INTERPRETED_PROGRAMS = 3  # in the interpreter programs are slow and blocks nearly free


class Launcher:
    """A kernel and its compiled variants.

    Args:
        kernel: A `@triton.jit` function that specializes none of its arguments.
        num_warps: Warps of a program.
        max_registers: Of a thread, on NVIDIA cards; None: the compiler chooses.
    """

    def __init__(self, kernel: Any, num_warps: int, max_registers: int | None = None) -> None:
        self.kernel = kernel
        self.options: dict[str, int] = {"num_warps": num_warps}
        if max_registers is not None and torch.version.hip is None:
            self.options["maxnreg"] = max_registers
        self.variants: dict[tuple, Any] = {}

    def __call__(
        self, n_programs: int, device: torch.device, args: tuple[Tensor | int, ...], constants: dict
    ) -> None:
        """Launches on the current stream of `device`.

        Args:
            n_programs: The grid.
            device: Where the tensors live; need not be the current device.
            args: Tensors and integers below 2^31, in the order of the kernel's parameters.
            constants: The kernel's `constexpr` parameters by name, in their order.
        """
        if INTERPRETED:
            self.kernel[(n_programs,)](*args, **constants)
            return
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(n_programs, device, args, constants)
            return
        key = (
            device.index,
            *(a.dtype for a in args if isinstance(a, Tensor)),
            *constants.values(),
        )
        compiled = self.variants.get(key)
        if compiled is None:
            self.variants[key] = self.kernel[(n_programs,)](*args, **constants, **self.options)
            return
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
        stream = torch.cuda.current_stream(device).cuda_stream
        compiled[(n_programs, 1, 1)](*plain, *constants.values(), stream=stream)


@functools.cache
def n_processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if INTERPRETED:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def wide_fp64(device: torch.device) -> bool:
    """Whether fp64 units are plentiful: at 1/2 of the fp32 rate, not at 1/32 or less."""
    if INTERPRETED or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))
