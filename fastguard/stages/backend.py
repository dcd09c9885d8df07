"""Selects the implementation of the stages for a device.

    cpu        CPUs: NumPy and PyTorch, limited by memory bandwidth
    triton     CUDA and ROCm devices that Triton supports
    reference  all other devices, and tensor subclasses that wrap tensors: PyTorch in float64,
               without synchronization

All three have the same signatures. The choice is made once per device, from what is installed and
what the device supports; `fastguard.backend_for(tensor)` returns it. A GPU that Triton does not
support uses the reference, after one warning with the reason. The environment variable
`FASTGUARD_BACKEND=torch` turns the kernels off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastguard.errors.versions import OLDEST_TRITON, numbers_of
from fastguard.gradients.buckets import GradBucket
from fastguard.gradients.tensor_kinds import PLAIN, WRAPPED, Kind
from fastguard.gradients.unit_buckets import UnitBucket
from fastguard.stages import reference, traced
from fastguard.stages.contract import GuardState, Policy, Signals, Verdict
from fastguard.stages.cpu import stages as cpu
from fastguard.stages.grad_stats import GradStats

TRITON_DEVICES = ("cuda",)  # ROCm devices have the type "cuda" too
SETTING = "FASTGUARD_BACKEND"  # an environment variable with the value "torch" or "triton"


def backend_for(tensor: Tensor) -> Literal["triton", "torch"]:
    """Returns the backend used for gradients on the device of `tensor`.

    Args:
        tensor: A tensor on the device in question, of any shape and dtype.

    Returns:
        `"triton"` for the Triton kernels, `"torch"` for the PyTorch implementation.

    Raises:
        TypeError: `tensor` is not a tensor.

    Example:
        >>> import torch, fastguard
        >>> fastguard.backend_for(torch.zeros(1))
        'torch'
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"tensor is a {type(tensor).__name__}; pass a tensor, such as next(model.parameters())"
        )
    return backend_of(tensor.device)


def backend_of(device: torch.device) -> Literal["triton", "torch"]:
    """Returns the backend used for a device."""
    return "torch" if device.type == "cpu" or triton_stages(device) is None else "triton"


class Stages(Protocol):
    """The functions of a backend; `fastguard.stages.reference` defines them in plain PyTorch."""

    @staticmethod
    def measure_bucket(
        bucket: GradBucket,
        n_segments: int,
        n_tensors: int,
        norm_type: float,
        inv_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns power sums `(4, S)` and counts `(3, T)` of one bucket."""
        ...

    @staticmethod
    def decide(
        stats: GradStats, signals: Signals, state: GuardState | None, policy: Policy
    ) -> Verdict:
        """Returns the verdict on one step, and updates `state`."""
        ...

    @staticmethod
    def apply(
        bucket: GradBucket, multiplier: Tensor, clean: Tensor, changes: Tensor | None = None
    ) -> None:
        """Scales and cleans one bucket in place; nothing has to change if `changes` is 0."""
        ...

    @staticmethod
    def pack(
        row: Tensor,
        stats: GradStats,
        signals: Signals,
        verdict: Verdict,
        state: GuardState,
        lr: Tensor | None,
    ) -> None:
        """Writes the record of one step into `row`."""
        ...

    @staticmethod
    def read_bits(bucket: GradBucket, n_segments: int, nonzero: bool, checksum: bool) -> Tensor:
        """Returns counts of nonzero elements and the checksum of one bucket, int64 `(S + 1,)`."""
        ...

    @staticmethod
    def count_exponents(bucket: GradBucket, stride: int, inv_scale: Tensor | None = None) -> Tensor:
        """Returns the counts of the exponents of a sample of one bucket, int64 `(257,)`."""
        ...

    @staticmethod
    def clip_units(
        units: UnitBucket,
        limits: Tensor,
        norm_type: float,
        propagates: bool,
        inv_scale: Tensor | None = None,
        skips: Tensor | None = None,
    ) -> Tensor:
        """Clips the units of one bucket in place; returns what was clipped, float64 `(4,)`."""
        ...


def stages(device: torch.device, kind: Kind = PLAIN) -> Stages:
    """Returns the backend for tensors of this device and kind."""
    if kind is not PLAIN:
        return reference if kind is WRAPPED else traced
    if device.type == "cpu":
        return cpu
    return triton_stages(device) or reference


@functools.cache
def triton_stages(device: torch.device) -> Stages | None:
    """Returns the kernel launchers for a device; None, after one warning, if it is unsupported."""
    if device.type not in TRITON_DEVICES or kernels_are_off():
        return None
    reason = why_not_triton(device)
    if reason is None:
        return _kernel_stages()
    warnings.warn(
        f"fastguard uses PyTorch instead of its Triton kernels on {device}, because {reason}. "
        "The results are the same, but each step is slower. The kernels need triton>=3.4 (pip "
        "install 'triton>=3.4'), a GPU with compute capability 8.0 or newer, a C compiler (gcc or "
        "clang) and a matching driver; run `fastguard env` to check.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def kernels_are_off() -> bool:
    """Whether `FASTGUARD_BACKEND` turns the kernels off.

    Raises:
        ValueError: The value of the variable is not a backend.
    """
    asked = os.environ.get(SETTING, "").strip().lower()
    if asked not in ("", "triton", "torch"):
        raise ValueError(
            f"{SETTING}={asked!r} is not a backend; use torch (no kernels) or triton (kernels "
            "where they can run, the default)"
        )
    return asked == "torch"


def _kernel_stages() -> Stages:
    """Imports the kernels at the first GPU tensor: importing triton takes half a second."""
    import fastguard.stages.triton as triton

    return triton


def _try_launching(device: torch.device) -> None:
    from fastguard.kernels.launch import try_launching

    try_launching(device)


def why_not_triton(device: torch.device) -> str | None:
    """Returns the reason why Triton kernels cannot be used on a device; None if they can.

    Imports the kernels and launches one kernel, so that a Triton installation that cannot compile
    is detected now and not in the middle of a step. Takes half a second if nothing is cached.
    """
    if device.type not in TRITON_DEVICES:
        return "Triton kernels need a CUDA device"
    if kernels_are_off():
        return f"{SETTING}=torch"
    reason = triton_problem(device)
    if reason is not None:
        return reason
    try:
        _kernel_stages()
    except Exception as error:  # a broken wheel may raise OSError, AttributeError or others
        return f"importing triton failed: {error!r}"
    if torch.cuda.is_current_stream_capturing():
        # no trial now, since the graph would record it; an earlier ordinary step has made the trial
        return None
    try:
        _try_launching(device)
    except Exception as error:  # the compiler, the linker or the driver may raise any error
        return f"a first kernel could not be launched: {_one_line(error)}"
    return None


def _one_line(error: Exception) -> str:
    """Returns the type of an error and the first 200 characters of its message."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:200]}"


def triton_problem(device: torch.device | None = None) -> str | None:
    """Returns why Triton cannot be used on this machine or device; None if no reason is found.

    Checks versions and the device without importing triton.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("triton")
    except PackageNotFoundError:
        # triton may be installed under another distribution name, such as pytorch-triton
        installed = None
    if installed is not None:
        if numbers_of(installed) < OLDEST_TRITON:
            return f"triton {installed} is older than 3.4"
    if device is not None and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"the compute capability of the device is {capability[0]}.{capability[1]}"
    return None
