"""Integration with the Ultralytics trainer: `guard(model)`, then `model.train(...)` as usual.

Written for and tested with ultralytics 8.4.190, which is AGPL-3.0: `torch-fastguard[ultralytics]`.

The trainer's own step clips to norm 10, skips only in fp16, and always updates the EMA; in fp32 and
bf16, one bad batch destroys every weight. With the guard, a skipped step leaves weights, optimizer
state, BatchNorm statistics and EMA unchanged.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastguard.integrations.shared import RunRecords, Sink, needs
from fastguard.integrations.ultralytics.callbacks import UltralyticsGuard


def guard(
    model: Any,
    *,
    max_norm: float | None = 10.0,
    schedule: Mapping[str, Any] | None = None,
    records: str | os.PathLike[str] | None = None,
    sinks: Sequence[Sink] = (),
    **options: Any,
) -> UltralyticsGuard:
    """Guards every later `model.train(...)`; records go to `records.jsonl` in the run's folder.

    Each step synchronizes with the GPU, as the trainer's progress bar does anyway.

    Args:
        model: A `YOLO` or another ultralytics model, or one of its trainers.
        max_norm: Replaces the trainer's fixed limit of 10; None: no clipping. Default: 10.
        schedule: Arguments of `GuardedLR` (floor, backoff, recovery, warmup), applied on top of the
            trainer's own schedule. With `warmup`, train with `warmup_epochs=0`. Default: None.
        records: JSON lines file to which rank 0 appends each record; None: `records.jsonl` in the
            folder of the run.
        sinks: Called with each record on rank 0, such as `TensorBoardSink("run")`.
        options: Further arguments of `GuardedOptimizer`, such as `spike`.

    Returns:
        The attached guard; its `optimizer` is set once training has started.

    Raises:
        ModuleNotFoundError: ultralytics is not installed.
        TypeError: `model` is not a model or trainer of ultralytics, `records` is not a path, or a
            sink is not callable.
        OSError: `records` is a folder.
        ValueError: The model is already guarded.

    Example:
        >>> from ultralytics import YOLO                                    # doctest: +SKIP
        >>> model = YOLO("yolo11n.yaml")                                    # doctest: +SKIP
        >>> guard(model, schedule={"backoff": 0.5, "recovery": 1000})       # doctest: +SKIP
        >>> model.train(data="coco8.yaml", epochs=100)                      # doctest: +SKIP
    """
    with needs("ultralytics"):
        from ultralytics.engine.model import Model
        from ultralytics.engine.trainer import BaseTrainer
    if not isinstance(model, Model | BaseTrainer):
        raise TypeError(
            f"model={model!r} must be an ultralytics model, such as YOLO('yolo11n.yaml')"
        )
    for callback in model.callbacks["on_pretrain_routine_end"]:
        if isinstance(getattr(callback, "__self__", None), UltralyticsGuard):
            raise ValueError("the model is already guarded; call guard() only once")
    run_records = RunRecords(records, sinks)
    guarded = UltralyticsGuard({"max_norm": max_norm, **options}, schedule or {}, run_records)
    for name in vars(UltralyticsGuard):
        if name.startswith("on_") or name == "teardown":
            model.add_callback(name, getattr(guarded, name))
    return guarded
