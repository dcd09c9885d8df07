"""Measures the cost of guarding a step on this machine, in about a minute.

Every number is a ratio to the usual code, measured in the same process and the same rounds. The
whole suite, with growth curves and charts, is `make bench` in the source tree.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fastguard.commands.bench.machine import slug_of
from fastguard.commands.bench.results import save
from fastguard.commands.bench.selection import SECONDS, selection
from fastguard.commands.bench.session import measure_cases
from fastguard.commands.bench.table import row_table
from fastguard.commands.usage import UsageError, need, output_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard bench`."""
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if available)")
    parser.add_argument("--out", metavar="DIR", help="also write the result as JSON into DIR")


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes; returns the exit status."""
    need("rich", extra="cli")
    device = device_of(args.device)
    folder = output_folder(args.out) if args.out else None
    console = wide_console()
    command = "fastguard bench" + (f" --device {args.device}" if args.device else "")
    result = measure_cases(
        selection(device), device, command=command, seconds=SECONDS, console=console
    )
    console.print(row_table(result))
    if folder:
        path = folder / f"{slug_of(result['machine'])}-quick.json"
        save(result, path)
        console.print(f"written: {path}")
    return 0


def wide_console() -> Any:
    """A console for the terminal; files and pipes get the full width of the tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=130)


def device_of(name: str | None) -> torch.device:
    """Returns the named device. Default: a GPU if available.

    Raises:
        UsageError: The device does not exist or is not supported.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is not a device; use cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; "
            "use --device cpu"
        )
    return device
