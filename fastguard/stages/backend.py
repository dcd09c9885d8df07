"""Which backend serves a device: one table of three peers with one signature.

    cpu        CPUs: NumPy and PyTorch at the speed of memory
    triton     CUDA and ROCm devices that Triton can compile for
    reference  every other device, and tensors that wrap others: PyTorch in float64, without a wait

The choice is made once for each device, by what is installed and what the device can do, and can be
asked: `fastguard.backend_for(tensor)`. A GPU that Triton cannot serve gets one warning that says
why, and the reference. `FASTGUARD_BACKEND=torch` in the environment turns the kernels off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBucket
from fastguard.gradients.tensor_kinds import PLAIN, WRAPPED, Kind
from fastguard.gradients.unit_buckets import UnitBucket
from fastguard.stages import reference, traced
from fastguard.stages.contract import GradStats, GuardState, Policy, Signals, Verdict
from fastguard.stages.cpu import stages as cpu
from fastguard.versions import OLDEST_TRITON, numbers_of

TRITON_DEVICES = ("cuda",)  # ROCm devices call themselves cuda too
SETTING = "FASTGUARD_BACKEND"  # an environment variable: "torch" or "triton"


def backend_for(tensor: Tensor) -> Literal["triton", "torch"]:
    """The backend that serves gradients on the device of `tensor`.

    Raises:
        TypeError: It is no tensor.

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
    """The backend that serves a device."""
    return "torch" if device.type == "cpu" or triton_stages(device) is None else "triton"


class Stages(Protocol):
    """What each backend does; `fastguard.stages.reference` says it in plain PyTorch."""

    @staticmethod
    def measure_bucket(
        bucket: GradBucket,
        n_segments: int,
        n_tensors: int,
        norm_type: float,
        inv_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Power sums `(4, S)` and counts `(3, T)` of one bucket."""
        ...

    @staticmethod
    def decide(
        stats: GradStats, signals: Signals, state: GuardState | None, policy: Policy
    ) -> Verdict:
        """The verdict on one step; `state` is brought up to date."""
        ...

    @staticmethod
    def apply(
        bucket: GradBucket, multiplier: Tensor, clean: Tensor, changes: Tensor | None = None
    ) -> None:
        """Scales and cleans one bucket in place; `changes`, where known, is 0 for nothing to do."""
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
    def unit_coefs(
        units: UnitBucket,
        limits: Tensor,
        norm_type: float,
        propagates: bool,
        inv_scale: Tensor | None = None,
    ) -> Tensor:
        """The coefficient of each unit of one bucket, float64 `(U,)`."""
        ...

    @staticmethod
    def scale_units(units: UnitBucket, coefs: Tensor) -> None:
        """Multiplies the gradient of each unit in place."""
        ...


def stages(device: torch.device, kind: Kind = PLAIN) -> Stages:
    """The backend for tensors of this device and kind."""
    if kind is not PLAIN:
        return reference if kind is WRAPPED else traced
    if device.type == "cpu":
        return cpu
    return triton_stages(device) or reference


@functools.cache
def triton_stages(device: torch.device) -> Stages | None:
    """The kernel launchers for a device, or None after one warning that says why not."""
    if device.type not in TRITON_DEVICES or kernels_are_off():
        return None
    reason = why_not_triton(device)
    if reason is None:
        return _kernel_stages()
    warnings.warn(
        f"fastguard serves {device} with PyTorch instead of Triton kernels, because {reason}. "
        "Results are the same; guarding a step costs more. "
        "Remedy: pip install 'triton>=3.4' on a GPU of compute capability 8.0 or newer, beside a C "
        "compiler (gcc or clang) and a driver that fits; `fastguard env` tells when it serves.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def kernels_are_off() -> bool:
    """Whether `FASTGUARD_BACKEND` asks for PyTorch everywhere.

    Raises:
        ValueError: It names no backend.
    """
    asked = os.environ.get(SETTING, "").strip().lower()
    if asked not in ("", "triton", "torch"):
        raise ValueError(
            f"{SETTING}={asked!r} names no backend; use torch (no kernels) or triton (kernels "
            "where they can run, which is the default)"
        )
    return asked == "torch"


def _kernel_stages() -> Stages:
    """Imported for the first GPU tensor: importing triton takes half a second."""
    import fastguard.stages.triton as triton

    return triton


def _try_launching(device: torch.device) -> None:
    from fastguard.kernels.launch import try_launching

    try_launching(device)


def why_not_triton(device: torch.device) -> str | None:
    """Why PyTorch serves a device and not Triton; None if Triton does.

    Imports the kernels and launches one, which takes half a second when nothing is cached: a triton
    that cannot compile is better found now than in the middle of a step.
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
    except Exception as error:  # a broken wheel raises OSError, AttributeError, ...
        return f"its import failed: {error!r}"
    if torch.cuda.is_current_stream_capturing():
        return None  # a graph would hold the trial; who captures has taken a step before
    try:
        _try_launching(device)
    except Exception as error:  # whatever a compiler, a linker or a driver does not like
        return f"a first kernel could not be launched: {_one_line(error)}"
    return None


def _one_line(error: Exception) -> str:
    """The kind of an error and how its message begins: compilers write pages."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:200]}"


def triton_problem(device: torch.device | None = None) -> str | None:
    """Why Triton cannot serve this machine or device, or None. Does not import triton on success
    of the cheap checks alone."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("triton")
    except PackageNotFoundError:
        installed = None  # bundled under another distribution name, e.g. pytorch-triton
    if installed is not None:
        if numbers_of(installed) < OLDEST_TRITON:
            return f"triton {installed} is older than 3.4"
    if device is not None and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"its compute capability is {capability[0]}.{capability[1]}"
    return None
