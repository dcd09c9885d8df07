"""Sinks for TensorBoard and other loggers: `TensorBoardSink`, `LogSink`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from fastguard.errors.logger import log
from fastguard.errors.plain_text import shown
from fastguard.records.step_record import REPLICA_DRIFT, StepRecord


class TensorBoardSink:
    """Writes `train/grad_norm`, `train/clip_coef`, `train/skipped`, `train/lr` and the losses.

    Args:
        writer: A `SummaryWriter`, or a folder for a new one.

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
    """Passes the scalars of every record to a logger that takes a dict and a step.

    This fits `log` of a Weights & Biases run, `mlflow.log_metrics`, and most other loggers. If the
    logger raises, the record is counted in `lost`, and one warning is logged.

    Args:
        log: Called as `log(scalars, step=step)`, with the names of `scalars`.
        prefix: Part of each name before the slash. Default: `"train"`.
        step_name: Pass the step as a scalar with this name instead of `step=`. This is needed for a
            W&B run, whose own step counter must only increase. Default: None.

    Raises:
        TypeError: `log` is not callable.

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
        self.lost: int = 0

    def __call__(self, record: StepRecord) -> None:
        values = scalars(record, self.prefix)
        try:
            if self.step_name is None:
                self.log(values, step=record.step)
            else:
                self.log({**values, self.step_name: record.step})
        except Exception as error:  # a logger may raise any error; the run continues
            self.lost += 1
            if self.lost == 1:
                log.warning(
                    "records are being lost: %s cannot log: %s",
                    shown(self.log, 200),
                    shown(error, 200),
                )


def scalars(record: StepRecord, prefix: str = "train") -> dict[str, float]:
    """Returns the numbers of a record that loggers plot, under the usual names.

    Args:
        record: One step.
        prefix: Part of each name before the slash. Default: `"train"`.

    Returns:
        The values by name. Values that are not finite are left out, which makes a gap in plots;
        `skipped` shows the incident. Only the gradient norm may be NaN or Inf, because it is the
        norm as torch computes it; the norm of the finite elements would look like a dip. A loss
        named `seg` becomes `train/seg_loss`.

    Example:
        >>> from fastguard import StepRecord
        >>> scalars(StepRecord(1, 2.0, 0.5, "clipped", lr=0.1))
        {'train/grad_norm': 2.0, 'train/clip_coef': 0.5, 'train/lr': 0.1, 'train/skipped': 0.0}
    """
    values = {"clip_coef": record.clip_coef, "lr": record.lr}
    values |= {"skipped": float(record.action == "skipped")}
    # "seg_loss", not "loss/seg": MLflow's file store cannot have a metric and a folder "loss".
    values |= {name if "loss" in name else f"{name}_loss": v for name, v in record.losses.items()}
    values |= _watched(record)
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    return {f"{prefix}/{name}": v for name, v in {"grad_norm": record.torch_norm, **values}.items()}


def _watched(record: StepRecord) -> dict[str, float]:
    """Returns the scalars of a watched step: `grad_norms/layer.weight`, `noise_scale`, and so on.

    The folder is named `grad_norms` because MLflow refuses a folder with the name of the metric
    `grad_norm`.
    """
    watch = record.watch
    values = {f"grad_norms/{name}": v for name, v in watch.get("tensor_norms", {}).items()}
    values |= {f"update_ratios/{name}": v for name, v in watch.get("update_ratio", {}).items()}
    lost = watch.get("underflow", {})
    values |= {f"underflow/{name}": v for name, v in lost.items() if name != "exponents"}
    if "noise_scale" in watch:
        values["noise_scale"] = watch["noise_scale"]
    if REPLICA_DRIFT in watch:
        values[REPLICA_DRIFT] = float(any(watch[REPLICA_DRIFT].values()))
    return values
