"""Shared by the scripts for a single card: options, and the commit that is measured."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from fastguard.commands.bench import machine
from fastguard.commands.bench.command import device_of
from fastguard.commands.usage import UsageError


def options(
    name: str, about: str | None, *, quick: str, seconds: float, what: str = ""
) -> argparse.Namespace | None:
    """Parses the options of `python -m benchmarks.<name>`.

    Args:
        name: Name of the module.
        about: Docstring of the module.
        quick: Help of `--quick`.
        seconds: Default of `--seconds`.
        what: Help of `--seconds`.

    Returns:
        `device`, which becomes the current device, `out`, `quick` and `seconds`; None, after
        printing an error, if the device is not available.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"{what}(default: %(default)g)"
    )
    args = parser.parse_args()
    try:
        args.device = device_of(args.device)
    except UsageError as error:
        print(f"{error}; use --device cpu --quick to try the script", file=sys.stderr)
        return None
    if args.device.type == "cuda":
        args.device = torch.device("cuda", args.device.index or 0)
        torch.cuda.set_device(args.device)
    return args


def commit() -> str | None:
    """Returns `COMMIT`, which names the source if there is no .git, or the commit of the tree."""
    return os.environ.get("COMMIT") or machine.commit()
