"""`LogSink` with real loggers: Weights & Biases offline, and MLflow with a local folder."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastguard import GuardedOptimizer, LogSink
from guardtest import require


def run_with(sink: LogSink) -> None:
    opt = GuardedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5))
    opt.add_sink(sink)
    for loss in (1.0, math.nan, 3.0):
        opt.step(loss={"loss": loss, "prior": 2.0})
    assert sink.lost == 0


@pytest.fixture
def wandb_run(tmp_path):
    wandb = require("wandb")
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(mode="offline", dir=tmp_path, project="test", settings=settings)
    yield run
    run.finish()


def history(folder: Path) -> list[dict[str, float]]:
    """Returns the history that Weights & Biases wrote, one dict per step."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in entries(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): float(i.value_json) for i in items})
    return rows


def entries(log: bytes) -> Iterator[bytes]:
    """Yields the entries of a `.wandb` file, which is a LevelDB log.

    Its blocks of 32 KiB contain fragments. A fragment begins with 7 bytes: checksum, length and
    type (1 whole, 2 first, 3 middle, 4 last).
    """
    at, entry = 7, b""  # after the file's own header
    while at + 7 <= len(log):
        if (1 << 15) - at % (1 << 15) < 7:  # the rest of the block is padding
            at += -at % (1 << 15)
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        entry = (b"" if kind in (1, 2) else entry) + log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield entry


@pytest.mark.parametrize("step_name", [None, "train/step"])
def test_weights_and_biases(wandb_run, tmp_path, step_name):
    run_with(LogSink(wandb_run.log, step_name=step_name))
    wandb_run.finish()
    require("wandb").teardown()  # waits for the process that writes the file
    rows = history(tmp_path)
    assert [row["train/skipped"] for row in rows] == [0.0, 1.0, 0.0]
    assert [row[step_name or "_step"] for row in rows] == [1, 2, 3]
    assert [row.get("train/loss") for row in rows] == [1.0, None, 3.0]  # NaN is not plotted
    assert {"train/grad_norm", "train/clip_coef", "train/lr", "train/prior_loss"} <= set(rows[0])


def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = require("mlflow")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("test")
    with mlflow.start_run() as run:
        run_with(LogSink(mlflow.log_metrics))
    client = mlflow.MlflowClient()

    def points(name):
        return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]

    assert points("train/skipped") == [(1, 0.0), (2, 1.0), (3, 0.0)]
    assert points("train/loss") == [(1, 1.0), (3, 3.0)]
    assert points("train/prior_loss") == [(1, 2.0), (2, 2.0), (3, 2.0)]
