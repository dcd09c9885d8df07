"""Versions, devices and the backend of each device: include this in bug reports."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from typing import Any

import torch

import fastguard
from fastguard.errors.versions import missing_features
from fastguard.records.run_header import TRITON, installed_version
from fastguard.records.strict_json import dumps
from fastguard.stages.backend import why_not_triton

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
"""Optional distributions that fastguard integrates with, by package-index name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard env`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--verbose", action="store_true", help="also show avoidable costs in this process"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the environment."""
    found = environment()
    if not args.verbose:
        del found["diagnostics"]
    print(dumps(found, indent=2) if args.json else as_text(found))
    return 0


def environment() -> dict[str, Any]:
    """Describes the environment of this process as JSON values. Imports no optional package.

    `"diagnostics"` counts avoidable costs since the process began: `copied_gradients` is the number
    of gradients that had to be copied for a kernel because their strides leave holes or overlap.
    To check a training run, call this function in its process.
    """
    return {
        "versions": {
            "fastguard": fastguard.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "triton": installed_version(*TRITON),
            "numpy": installed_version("numpy"),
        },
        "machine": {
            "os": platform.platform(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "missing_features": missing_features(),
        "devices": [_describe(device) for device in devices()],
        "frameworks": {name: installed_version(name) for name in FRAMEWORKS},
        "diagnostics": _diagnostics(),
    }


def as_text(found: dict[str, Any]) -> str:
    """Formats the environment as aligned plain text that can be pasted into an issue."""
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
    stages = sys.modules.get("fastguard.stages.triton")  # None if no kernel has run
    return stages.diagnostics() if stages is not None else {"copied_gradients": 0}


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
