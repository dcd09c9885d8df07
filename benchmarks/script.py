"""What the scripts for one card share: their options, and which source they measure."""

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
    """The options of `python -m benchmarks.<name>`; None after saying that the device is not there.

    Args:
        name: Of the module.
        about: Its docstring.
        quick: What `--quick` does.
        seconds: The default of `--seconds`.
        what: What these are for.

    Returns:
        `device` (a card is the current one from here on), `out`, `quick` and `seconds`.
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
        print(f"{error}; --quick tries the script", file=sys.stderr)
        return None
    if args.device.type == "cuda":
        args.device = torch.device("cuda", args.device.index or 0)
        torch.cuda.set_device(args.device)
    return args


def commit() -> str | None:
    """`COMMIT`, which names the source where there is no .git, else the commit of the tree."""
    return os.environ.get("COMMIT") or machine.commit()
