"""Who serves which device: Triton kernels on GPUs, PyTorch everywhere else.

The choice is made once for each device type, by what is installed and what the device can do, and
can be asked: `fastguard.backend_for(tensor)`. A GPU that Triton cannot serve gets one warning that
says why, and PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import PLAIN, WRAPPED, Kind

OLDEST_TRITON = (3, 6)
TRITON_DEVICES = ("cuda",)  # ROCm devices call themselves cuda too


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


def stages(device: torch.device, kind: Kind = PLAIN) -> ModuleType:
    """The module whose `measure`, `decide` and `apply` work on tensors of this device and kind."""
    if kind is not PLAIN:
        return reference() if kind is WRAPPED else _traced()
    kernels = None if device.type == "cpu" else triton_stages(device)
    return reference() if kernels is None else kernels


@functools.cache
def reference() -> ModuleType:
    """Imported when it is first asked for, since it imports what imports this; kept, since finding
    it again takes 15 µs behind a model that filled the caches.
    """
    return importlib.import_module("fastguard.stages.reference")


@functools.cache
def _traced() -> ModuleType:
    return importlib.import_module("fastguard.stages.traced")


@functools.cache
def triton_stages(device: torch.device) -> ModuleType | None:
    """The kernel launchers for a device, or None after one warning that says why not."""
    if device.type not in TRITON_DEVICES:
        return None
    reason = why_not_triton(device)
    if reason is None:
        return importlib.import_module("fastguard.stages.triton")
    warnings.warn(
        f"fastguard serves {device} with PyTorch instead of Triton kernels, because {reason}. "
        "Results are the same; guarding a step costs more. "
        "Remedy: pip install 'triton>=3.6' on a GPU of compute capability 8.0 or newer, beside a C "
        "compiler (gcc or clang) and a driver that fits; `fastguard env` tells when it serves.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def why_not_triton(device: torch.device) -> str | None:
    """Why PyTorch serves a device and not Triton; None if Triton does.

    Imports the kernels and launches one, which takes half a second when nothing is cached: a triton
    that cannot compile is better found now than in the middle of a step.
    """
    if device.type not in TRITON_DEVICES:
        return f"the kernels serve {' and '.join(TRITON_DEVICES)} devices"
    reason = triton_problem(device)
    if reason is not None:
        return reason
    try:
        importlib.import_module("fastguard.stages.triton")
    except Exception as error:  # a broken wheel raises OSError, AttributeError, ...
        return f"its import failed: {error!r}"
    if torch.cuda.is_current_stream_capturing():
        return None  # a graph would hold the trial; who captures has taken a step before
    try:
        importlib.import_module("fastguard.kernels.launch").try_launching(device)
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
        numbers = tuple(int(n) for n in installed.split("+")[0].split(".")[:2] if n.isdigit())
        if numbers < OLDEST_TRITON:
            return f"triton {installed} is older than 3.6"
    if device is not None and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"its compute capability is {capability[0]}.{capability[1]}"
    return None
