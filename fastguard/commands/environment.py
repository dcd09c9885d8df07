"""Versions, devices, and which backend serves each: what a bug report should begin with."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

import fastguard
from fastguard.records.strict_json import dumps
from fastguard.stages.backend import why_not_triton
from fastguard.versions import missing_features

FRAMEWORKS = (
    "transformers",
    "accelerate",
    "lightning",
    "pytorch-lightning",
    "ultralytics",
    "tensorboard",
    "rich",
    "matplotlib",
    "plotly",
    "orjson",
    "pyyaml",
)
"""The optional distributions that fastguard works with, by their names on the package index."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastguard env`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--verbose", action="store_true", help="also what cost more than it should in this process"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the environment."""
    found = environment()
    if not args.verbose:
        del found["diagnostics"]
    print(dumps(found, indent=2) if args.json else as_text(found))
    return 0


def environment() -> dict[str, Any]:
    """What this process runs on, as JSON values. Imports no optional package.

    `"diagnostics"` counts what has cost more than it should since the process began:
    `copied_gradients`, gradients with strides that leave holes, or that overlap another, and had to
    be copied for a kernel. To look at a training run, call this within it.
    """
    return {
        "versions": {
            "fastguard": fastguard.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "triton": _version("triton", "pytorch-triton", "pytorch-triton-rocm"),
            "numpy": _version("numpy"),
        },
        "machine": {
            "os": platform.platform(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "missing_features": missing_features(),
        "devices": [_describe(device) for device in devices()],
        "frameworks": {name: _version(name) for name in FRAMEWORKS},
        "diagnostics": _diagnostics(),
    }


def as_text(found: dict[str, Any]) -> str:
    """The environment for people: plain aligned lines, fit to paste into an issue."""
    lines = []
    for section in ("versions", "machine"):
        lines += [f"{name:<18} {value or '-'}" for name, value in found[section].items()]
        lines.append("")
    missing = found["missing_features"]
    lines += [f"without {name}: {why}" for name, why in missing.items()] + [""] * bool(missing)
    for device in found["devices"]:
        lines.append(f"{device['device']:<18} {device['name']}")
        why = (
            f" ({device['stages']} stages; {device['not_triton']})" if device["not_triton"] else ""
        )
        lines.append(f"{'':<18} backend: {device['backend']}{why}")
    lines.append("")
    lines += [f"{name:<18} {value or '-'}" for name, value in found["frameworks"].items()]
    if "diagnostics" in found:
        lines += ["", *(f"{name:<18} {n}" for name, n in found["diagnostics"].items())]
    return "\n".join(lines)


def _diagnostics() -> dict[str, int]:
    stages = sys.modules.get("fastguard.stages.triton")  # not imported: no kernel has run
    return stages.diagnostics() if stages is not None else {"copied_gradients": 0}


def _version(*distributions: str) -> str | None:
    """The version of the first distribution that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def devices() -> list[torch.device]:
    """The CPU and every accelerator that torch can use."""
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        devices += [torch.device(accelerator.type, i) for i in range(count)]
    return devices


def _describe(device: torch.device) -> dict[str, Any]:
    not_triton = why_not_triton(device)
    without_kernels = "cpu" if device.type == "cpu" else "reference"
    return {
        "device": str(device),
        "name": _device_name(device),
        "backend": "triton" if not_triton is None else "torch",
        "stages": "triton" if not_triton is None else without_kernels,
        "not_triton": not_triton,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.processor() or platform.machine()
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}"
