"""Launches kernels with as little host work as Triton allows.

The first launch of a variant (constants, device, types of the arguments) uses Triton's JIT, which
compiles it; later launches pass plain integers to the launcher of the returned `CompiledKernel`.
This is safe because none of our kernels specializes an argument on its value or alignment, so one
variant is valid for every call. Passing addresses as integers avoids a driver query per address.

Host time with 8 pointers and 10 constants, without the time of the driver [EPYC, Python 3.11]:

| launched through                           | µs  |                                    |
|--------------------------------------------|-----|------------------------------------|
| the JIT                                    | 5.9 |                                    |
| `compiled[grid](...)`, torch's stream      | 4.4 | of which 1.9 for objects for hooks |
| `compiled.run(...)`, the stream's address  | 1.4 | used                               |
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels import versions
from fastguard.kernels.versions import launches_are_watched

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton interprets kernels on the CPU (`TRITON_INTERPRET=1`), as in the tests."""

WARP = 32 if torch.version.hip is None else 64
"""Threads per warp. AMD's consumer cards have 32, so programs on them have half as many threads."""

# small, since the interpreter is slow per program and block sizes hardly matter
INTERPRETED_PROGRAMS = 3


class Launcher:
    """A kernel and the options shared by all its variants.

    Args:
        kernel: A `@triton.jit` function that specializes no argument, with pointers first, then
            integers, then constants.
        num_warps: Warps per program.
        max_registers: Maximum registers per thread on NVIDIA cards. Default: None, the compiler's
            choice.
        fuses: Whether a product and a sum may be fused into one operation. Default: True.
    """

    def __init__(
        self, kernel: Any, num_warps: int, max_registers: int | None = None, fuses: bool = True
    ) -> None:
        self.kernel = kernel
        # The option is always set, since its default differs between versions of triton.
        self.options: dict[str, int] = {"num_warps": num_warps, "enable_fp_fusion": fuses}
        if max_registers is not None and torch.version.hip is None:
            self.options["maxnreg"] = max_registers

    def variant(self, device: torch.device, **constants: Any) -> Variant:
        """Returns the kernel for a device and constants, to be reused for many launches.

        Args:
            device: Device of the tensors, which need not be the current device.
            constants: The `constexpr` parameters of the kernel, in order.
        """
        return Variant(self, device, constants)


class OneProgram:
    """A kernel that runs as one program, with more warps if there are many segments.

    With one warp and 128 lanes, 5000 segments take 40 consecutive rounds, about 100 µs of latency
    [der]; with 8 warps and 1024 lanes they take 5 rounds. For up to 128 segments, a single warp is
    used, since its sums need no barrier between warps.
    """

    MANY = 128  # with more segments, 8 warps are used

    def __init__(self, kernel: Any) -> None:
        self._few, self._many = Launcher(kernel, num_warps=1), Launcher(kernel, num_warps=8)

    def of(self, n_segments: int) -> Launcher:
        """Returns the launcher for a number of segments."""
        return self._few if n_segments <= self.MANY else self._many

    def block_size(self, n_segments: int) -> int:
        """Returns the number of lanes for a number of segments."""
        if n_segments > self.MANY:
            return 1024
        return max(32, triton.next_power_of_2(n_segments))


class Variant:
    """A kernel with constants on one device, compiled at the first call.

    The dtypes of the tensors must be the same in every call; stages keep one variant for each set.
    """

    __slots__ = ("_compiled", "_constants", "_index", "_launcher", "_run", "_stream", "_values")

    def __init__(self, launcher: Launcher, device: torch.device, constants: dict[str, Any]) -> None:
        self._launcher = launcher
        self._index = device.index
        self._constants = constants
        self._values = tuple(constants.values())
        self._compiled: Any = None
        self._run: Any = None
        self._stream: Any = None

    def __call__(self, n_programs: int, tensors: tuple[Tensor, ...], *numbers: int) -> None:
        """Launches on the current stream of the device.

        Args:
            n_programs: Size of the grid.
            tensors: The pointers of the kernel.
            numbers: The integers of the kernel, below 2^31.
        """
        if INTERPRETED:
            self._launcher.kernel[(n_programs,)](*tensors, *numbers, **self._constants)
            return
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                self(n_programs, tensors, *numbers)
            return
        compiled = self._compiled
        if compiled is None:
            self._compile(n_programs, tensors, numbers)
            return
        stream = self._stream(self._index)
        addresses = map(Tensor.data_ptr, tensors)
        if self._run is None or launches_are_watched():
            compiled[(n_programs, 1, 1)](*addresses, *numbers, *self._values, stream=stream)
            return
        self._run(
            n_programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *addresses, *numbers, *self._values,
        )  # fmt: skip

    def _compile(
        self, n_programs: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]
    ) -> None:
        kernel, options = self._launcher.kernel, self._launcher.options
        compiled = kernel[(n_programs,)](*tensors, *numbers, **self._constants, **options)
        self._stream = raw_stream_of()
        self._run = compiled.run if versions.RUN_IS_KNOWN else None
        self._compiled = compiled


@triton.jit(do_not_specialize=["x_ptr"])
def trial_kernel(x_ptr, VALUE: tl.constexpr):
    """Stores a value."""
    tl.store(x_ptr, VALUE)


def try_launching(device: torch.device) -> None:
    """Compiles a kernel and launches it in both ways that `Variant` uses; never syncs.

    Args:
        device: The device.

    Raises:
        Exception: Triton can be imported but does not work, for example because there is no C
            compiler for its launcher, the driver is too old, or the disk is full. The error may
            have any type.
    """
    x = torch.empty(1, dtype=torch.float32, device=device)
    launch = Launcher(trial_kernel, num_warps=1).variant(device, VALUE=1.0)
    for _ in range(2):
        launch(1, (x,))


@functools.cache
def raw_stream_of() -> Any:
    """Returns the function that maps a device index to the address of its current stream."""
    return triton.runtime.driver.active.get_current_stream


@functools.cache
def n_processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a device."""
    if INTERPRETED:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def wide_fp64(device: torch.device) -> bool:
    """Returns whether fp64 runs at 1/2 of the fp32 rate, and not at 1/32 or less."""
    if INTERPRETED or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))
