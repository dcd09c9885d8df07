"""Records in TensorBoard and in the log: `TensorBoardSink`, `LogSink`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

from fastguard.errors.plain_text import shown
from fastguard.records.step_record import StepRecord

log = logging.getLogger("fastguard")


class TensorBoardSink:
    """Writes `train/grad_norm`, `train/clip_coef`, `train/skipped`, `train/lr` and the losses.

    Args:
        writer: A `SummaryWriter`, or a folder to make one for.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, writer: Any) -> None:
        if isinstance(writer, str | os.PathLike):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoard is not installed; run: pip install 'torch-fastguard[tensorboard]'"
                ) from error
            writer = SummaryWriter(os.fspath(writer))
        self.writer = writer

    def __call__(self, record: StepRecord) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Flushes and closes the writer."""
        self.writer.close()


class LogSink:
    """Hands the scalars of every record to a logger that takes a dict and a step.

    That is `log` of a Weights & Biases run, `mlflow.log_metrics`, and most others. What the logger
    raises is counted in `lost`, and said once.

    Args:
        log: Called as `log(scalars, step=step)`, with the names of `scalars`.
        prefix: What goes before the slash.
        step_name: Pass the step as a scalar of this name instead of `step=`: for a W&B run that
            counts its own steps, which it only lets grow.

    Raises:
        TypeError: `log` cannot be called.

    Example:
        >>> from fastguard import LogSink, StepRecord
        >>> sink = LogSink(lambda scalars, step: print(step, scalars["train/grad_norm"]))
        >>> sink(StepRecord(7, 2.0, 0.5, "clipped"))
        7 2.0
    """

    def __init__(
        self, log: Callable[..., object], *, prefix: str = "train", step_name: str | None = None
    ) -> None:
        if not callable(log):
            raise TypeError(
                f"log={shown(log, 200)} must be callable with a dict, such as wandb.init().log"
            )
        self.log = log
        self.prefix = prefix
        self.step_name = step_name
        self.lost = 0

    def __call__(self, record: StepRecord) -> None:
        values = scalars(record, self.prefix)
        try:
            if self.step_name is None:
                self.log(values, step=record.step)
            else:
                self.log({**values, self.step_name: record.step})
        except Exception as error:  # a logger has ways of its own to fail; the run goes on
            self.lost += 1
            if self.lost == 1:
                log.warning(
                    "records are being lost: %s cannot log: %s",
                    shown(self.log, 200),
                    shown(error, 200),
                )


def scalars(record: StepRecord, prefix: str = "train") -> dict[str, float]:
    """What loggers plot of a record, under the names that they are used to.

    Args:
        record: One step.
        prefix: What goes before the slash.

    Returns:
        Finite numbers only, so that a plot has a gap where there is none and `skipped` shows the
        incident; but for the gradient norm, which is NaN or Inf where torch's would be: the norm of
        the finite elements alone would look like a dip. A loss called `seg` is `train/seg_loss`.

    Example:
        >>> from fastguard import StepRecord
        >>> scalars(StepRecord(1, 2.0, 0.5, "clipped", lr=0.1))
        {'train/grad_norm': 2.0, 'train/clip_coef': 0.5, 'train/lr': 0.1, 'train/skipped': 0.0}
    """
    values = {"clip_coef": record.clip_coef, "lr": record.lr}
    values |= {"skipped": float(record.action == "skipped")}
    # "seg_loss" and not "loss/seg": to MLflow's file store loss cannot be a metric and a folder.
    values |= {name if "loss" in name else f"{name}_loss": v for name, v in record.losses.items()}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    return {f"{prefix}/{name}": v for name, v in {"grad_norm": record.torch_norm, **values}.items()}
