"""Checks a training setup in one run and prints the most important finding first.

  fastguard diagnose train:make

calls make() in train.py, which returns a dict: model, batch (inputs, targets), loss_fn (called as
loss_fn(model(inputs), targets)), and optionally optimizer, data (further batches), step (replaces
loss_fn: step(model, batch) returns the loss). Nothing is trained: the model is left unchanged.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from torch import nn

from fastguard.commands.diagnose.factory import setup_of
from fastguard.commands.diagnose.table import show
from fastguard.commands.diagnose.weights import load_weights
from fastguard.commands.usage import FINE, FOUND_BAD, UsageError
from fastguard.diagnosis import Diagnosis, diagnose
from fastguard.diagnosis.replay.subject import Subject

_NEVER = "never"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard diagnose`."""
    parser.add_argument(
        "setup", metavar="MODULE:FACTORY", help="function that returns the model and a batch"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="load these weights first: .pt, .pth, .ckpt or .safetensors; nothing is unpickled",
    )
    parser.add_argument(
        "--autocast",
        choices=("bfloat16", "float16"),
        help="run the step under torch.autocast with this dtype",
    )
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument(
        "--fail-on",
        choices=("error", "warning", _NEVER),
        default="error",
        help="lowest severity that gives exit status 1 (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Calls the factory, runs the diagnosis and prints the findings."""
    # Redirects the output of the user's code, which must not end up in the JSON.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        diagnosis = _diagnose(args)
    if args.json:
        print(diagnosis.to_json())
    else:
        show(diagnosis)
    bad = args.fail_on != _NEVER and diagnosis.at_least(args.fail_on)
    return FOUND_BAD if bad else FINE


def _diagnose(args: argparse.Namespace) -> Diagnosis:
    if args.checkpoint is not None and not args.checkpoint.exists():
        raise UsageError(f"--checkpoint {args.checkpoint} does not exist")
    setup = setup_of(args.setup)
    model: nn.Module = setup["model"]
    if args.checkpoint is not None:
        load_weights(model, args.checkpoint)
    if args.autocast is not None:
        setup["autocast"] = args.autocast
    try:
        Subject.of(**setup)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{args.setup}(): {error}") from None
    return diagnose(**setup)
