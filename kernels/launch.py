"""Launching a kernel with as little host work as Triton allows.

The first launch of a variant (constants, device, types of the arguments) goes through Triton's JIT,
which compiles it; later ones hand plain integers to the launcher of the `CompiledKernel` that it
returned. That is sound because no argument of our kernels is specialized on its value or alignment,
so that one variant is right for every call. Addresses as integers spare a driver query for each.

Host time with 8 pointers and 10 constants, without the driver's own [EPYC, Python 3.11]:

| through                                    | µs  |                                            |
|--------------------------------------------|-----|--------------------------------------------|
| the JIT                                    | 5.9 |                                            |
| `compiled[grid](...)`, torch's stream      | 4.4 | objects for hooks that nobody has set: 1.9 |
| `compiled.run(...)`, the stream's address  | 1.4 | used                                       |
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
"""Whether Triton runs kernels on the CPU (`TRITON_INTERPRET=1`), as the tests do."""

WARP = 32 if torch.version.hip is None else 64
"""Threads of a warp. AMD's consumer cards have 32, and get programs half as large."""

INTERPRETED_PROGRAMS = 3  # in the interpreter programs are slow and blocks nearly free


class Launcher:
    """A kernel and the options that all its variants share.

    Args:
        kernel: A `@triton.jit` function that specializes none of its arguments: pointers, then
            integers, then constants.
        num_warps: Warps of a program.
        max_registers: Of a thread, on NVIDIA cards; None: the compiler chooses.
        fuses: Whether a product and a sum may become one operation, rounded once.
    """

    def __init__(
        self, kernel: Any, num_warps: int, max_registers: int | None = None, fuses: bool = True
    ) -> None:
        self.kernel = kernel
        # Said in either case: the default differs between versions of triton.
        self.options: dict[str, int] = {"num_warps": num_warps, "enable_fp_fusion": fuses}
        if max_registers is not None and torch.version.hip is None:
            self.options["maxnreg"] = max_registers

    def variant(self, device: torch.device, **constants: Any) -> Variant:
        """The kernel for one device and set of constants, to be kept and called often.

        Args:
            device: Where the tensors live; need not be the current device.
            constants: The kernel's `constexpr` parameters, in their order.
        """
        return Variant(self, device, constants)


class OneProgram:
    """A kernel of one program, with as many warps as it has segments to go through.

    With one warp and 128 lanes, 5000 segments take 40 rounds one after another, about 100 µs of
    latency [der]; with 8 warps and 1024 lanes they take 5. Up to 128 segments one warp needs no
    barrier between warps for its sums.
    """

    MANY = 128  # segments

    def __init__(self, kernel: Any) -> None:
        self._few, self._many = Launcher(kernel, num_warps=1), Launcher(kernel, num_warps=8)

    def of(self, n_segments: int) -> Launcher:
        """The launcher for so many segments."""
        return self._few if n_segments <= self.MANY else self._many

    def block_size(self, n_segments: int) -> int:
        """How many lanes go with it."""
        if n_segments > self.MANY:
            return 1024
        return max(32, triton.next_power_of_2(n_segments))


class Variant:
    """A kernel on one device with constants, compiled at the first call.

    The types of the tensors must be the same at every call: a stage keeps one variant for each.
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
            n_programs: The grid.
            tensors: The kernel's pointers.
            numbers: Its integers, below 2^31.
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
    tl.store(x_ptr, VALUE)


def try_launching(device: torch.device) -> None:
    """Compiles and launches a kernel on a device, on both roads of a `Variant`. Waits for nothing.

    Raises:
        Exception: Whatever a triton raises that can be imported and not used: without a C compiler
            for its launcher, for a driver that is too old, or on a disk that is full.
    """
    x = torch.empty(1, dtype=torch.float32, device=device)
    launch = Launcher(trial_kernel, num_warps=1).variant(device, VALUE=1.0)
    for _ in range(2):
        launch(1, (x,))


@functools.cache
def raw_stream_of() -> Any:
    """The function that gives the address of the current stream of a device, by its index."""
    return triton.runtime.driver.active.get_current_stream


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
