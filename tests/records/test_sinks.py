"""Sinks: JSON lines that survive a kill, TensorBoard, any callable."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastguard
from fastguard import (
    GuardedOptimizer,
    JsonLinesSink,
    LogSink,
    StepRecord,
    TensorBoardSink,
    read_records,
)
from fastguard.records.loggers import scalars
from fastguard.records.read_json_lines import parse_record
from fastguard.records.rotated_files import rotated_files
from guardtest import require

NAN_RECORD = StepRecord(
    step=7,
    total_norm=math.inf,
    clip_coef=math.nan,
    action="skipped",
    reason="nonfinite_grad",
    nan=3,
    culprits=(("layer.0.weight", 2, 1, 0),),
    n_culprits=1,
    losses={"seg": math.nan, "prior": -math.inf},
    spikes=("seg",),
    thresholds={"seg": math.inf},
    consecutive_skips=2,
    lr=1e-3,
    tag=["epoch 3", 15],
)


def guarded() -> GuardedOptimizer:
    return GuardedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))


def records(n: int) -> list[StepRecord]:
    return [StepRecord(i, float(i), 1.0, "applied", lr=0.5) for i in range(1, n + 1)]


def test_records_read_back_equal_those_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with JsonLinesSink(tmp_path / "runs" / "today" / "r.jsonl") as sink:
        sink(NAN_RECORD)
    (read,) = read_records(sink.path)
    assert repr(read) == repr(NAN_RECORD)  # repr: NaN is not equal to itself
    assert not caplog.messages


def test_lines_are_json_that_every_parser_reads(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl") as sink:
        sink(NAN_RECORD)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    header, fields = (
        json.loads(line, parse_constant=refuse) for line in sink.path.read_text().splitlines()
    )
    assert header["kind"] == "header"
    assert fields["total_norm"] == "Infinity" and fields["losses"]["seg"] == "NaN"


def test_a_guarded_run_feeds_every_sink_in_order(tmp_path: Path) -> None:
    opt = guarded()
    seen: list[StepRecord] = []
    with JsonLinesSink(tmp_path / "r.jsonl") as sink:
        opt.add_sink(sink)
        opt.add_sink(seen.append)
        for loss in (1.0, math.nan, 2.0):
            opt.step(loss=loss)
    assert [r.action for r in seen] == ["applied", "skipped", "applied"]
    assert list(map(repr, read_records(sink.path))) == list(map(repr, seen))
    with pytest.raises(TypeError, match="callable"):
        opt.add_sink(3)  # type: ignore[arg-type]


def test_full_files_are_rotated_and_the_oldest_deleted(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl", max_bytes=1024, keep=3) as sink:
        for record in records(60):
            sink(record)
    assert len(rotated_files(sink.path)) == 3
    assert all(p.stat().st_size <= 1024 for p in tmp_path.iterdir())
    steps = [r.step for r in read_records(sink.path)]
    assert steps == list(range(steps[0], 61)) and 1 < steps[0] < 60


def test_a_name_with_brackets_is_not_a_pattern(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "run[1].jsonl", max_bytes=1024) as sink:
        for record in records(12):
            sink(record)
    assert rotated_files(sink.path)
    assert [r.step for r in read_records(sink.path)] == list(range(1, 13))


def test_more_than_nine_rotations_stay_in_order(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl", max_bytes=1024) as sink:
        for record in records(60):
            sink(record)
    assert len(rotated_files(sink.path)) > 10
    assert [r.step for r in read_records(sink.path)] == list(range(1, 61))


def test_keeping_none_deletes_all_full_files(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl", max_bytes=1024, keep=0) as sink:
        for record in records(60):
            sink(record)
    assert rotated_files(sink.path) == []


WRITER = """
import sys
from fastguard import JsonLinesSink, StepRecord
sink = JsonLinesSink(sys.argv[1])
step = 0
while True:
    step += 1
    sink(StepRecord(step, 1.0, 1.0, "applied", lr=0.5))
    if step == 200:
        print("writing", flush=True)
"""


def test_a_killed_writer_leaves_complete_records_and_the_next_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = [r.step for r in read_records(path)]
    assert len(steps) >= 200 and steps == list(range(1, len(steps) + 1))
    with path.open("ab") as file:
        file.write(b'{"step": 999, "total_no')  # as after a power cut
    with JsonLinesSink(path) as sink:
        sink(StepRecord(1, 1.0, 1.0, "applied"))
    assert [r.step for r in read_records(path)] == [*steps, 1]


def test_damaged_lines_are_skipped_and_counted_or_named_if_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "r.jsonl"
    with JsonLinesSink(path) as sink:
        sink(records(1)[0])
    with path.open("ab") as file:
        file.write(b'\x00\xff\n\n[1, 2]\n{"step": 1}\n')
    assert len(list(read_records(path))) == 1
    assert "3 damaged lines" in caplog.text
    with pytest.raises(ValueError, match=r"r\.jsonl:3 is not a record"):
        list(read_records(path, strict=True))
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "missing.jsonl"))


RECORD = '{"step": 1, "total_norm": 1, "clip_coef": 1, "action": "applied"'


@pytest.mark.parametrize(
    "line",
    [
        RECORD,  # cut short
        "null",
        '{"step": 1}',
        RECORD + ', "losses": [1]}',
        RECORD + ', "culprits": [["w", 1e999, 0, 0]]}',
        RECORD + ', "nan": "many"}',
        RECORD + ', "consecutive_skips": 1.5}',
        RECORD.replace("1,", "true,", 1) + "}",
        RECORD + ', "reason": 7}',
        RECORD.replace("1,", '"one",', 1) + "}",
        RECORD + ', "tag": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"step": 1\x00}',
    ],
    ids=lambda line: line[-20:],
)
def test_a_line_that_is_not_a_record_is_always_a_value_error(line: str) -> None:
    with pytest.raises(ValueError):
        parse_record(line.encode())


def test_a_line_of_a_newer_release_is_read() -> None:
    assert parse_record((RECORD + ', "mood": "fine"}').encode()).step == 1


def test_a_full_disk_loses_records_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opt = guarded()
    sink = JsonLinesSink(tmp_path / "r.jsonl")
    opt.add_sink(sink)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        for _ in range(3):
            opt.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert opt.applied_steps == 3 and sink.lost == 3
    assert caplog.text.count("records are being lost") == 1


def test_tensorboard_gets_scalars_under_their_usual_names(tmp_path: Path) -> None:
    require("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opt = guarded()
    sink = TensorBoardSink(tmp_path)
    opt.add_sink(sink)
    for loss in (1.0, math.nan, 2.0):
        opt.step(loss={"loss": loss, "prior": 1.0})
    sink.close()
    assert sink.writer.all_writers is None  # closed
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/grad_norm",
        "train/clip_coef",
        "train/skipped",
        "train/lr",
        "train/loss",
        "train/prior_loss",
    }
    assert [e.value for e in events.Scalars("train/skipped")] == [0.0, 1.0, 0.0]
    assert [e.step for e in events.Scalars("train/loss")] == [1, 3]  # NaN is not plotted


def test_any_logger_of_dicts_gets_the_scalars_under_its_prefix() -> None:
    seen: list[tuple[dict, int]] = []
    sink = LogSink(lambda values, step: seen.append((values, step)), prefix="critic")
    sink(records(2)[1])
    sink(NAN_RECORD)
    assert seen[0] == (
        {"critic/grad_norm": 2.0, "critic/clip_coef": 1.0, "critic/lr": 0.5, "critic/skipped": 0.0},
        2,
    )
    values, step = seen[1]
    assert math.isnan(values.pop("critic/grad_norm"))  # NaN as in torch, instead of a low value
    assert (values, step) == ({"critic/lr": 1e-3, "critic/skipped": 1.0}, 7)  # else finite ones


def test_a_logger_may_take_the_step_as_a_scalar() -> None:
    seen: list[dict] = []
    LogSink(seen.append, step_name="train/step")(records(1)[0])
    assert seen[0] == {**scalars(records(1)[0]), "train/step": 1}


def test_a_logger_that_fails_loses_records_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def offline(values: dict, step: int) -> None:
        raise ConnectionError("no network")

    opt, sink = guarded(), LogSink(offline)
    opt.add_sink(sink)
    for _ in range(3):
        opt.step()
    assert opt.applied_steps == 3 and sink.lost == 3
    assert caplog.text.count("records are being lost") == 1
    with pytest.raises(TypeError, match="log=3"):
        LogSink(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kwargs", [{"max_bytes": 1023}, {"max_bytes": 1e9}, {"keep": -1}, {"keep": 1.5}], ids=str
)
def test_bad_arguments_are_named(tmp_path: Path, kwargs: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        JsonLinesSink(tmp_path / "r.jsonl", **kwargs)


def test_sinks_are_public() -> None:
    assert fastguard.JsonLinesSink is JsonLinesSink


def test_between_a_rename_and_the_next_file_the_full_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with JsonLinesSink(path) as sink:
        for record in records(3):
            sink(record)
    path.rename(tmp_path / "r.1.jsonl")
    assert [r.step for r in read_records(path)] == [1, 2, 3]


def test_a_full_file_deleted_while_reading_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for name in ("r.1.jsonl", "r.2.jsonl", "r.jsonl"):
        with JsonLinesSink(tmp_path / name) as sink:
            for record in records(2):
                sink(record)
    reading = read_records(path)
    next(reading)
    (tmp_path / "r.2.jsonl").unlink()  # the run continues and keeps one full file
    assert [r.step for r in reading] == [2, 1, 2, 1, 2]


def test_files_deleted_before_they_could_be_read_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "r.jsonl"
    with JsonLinesSink(path, max_bytes=1024) as sink:
        for record in records(400):
            sink(record)
    reading = read_records(path)
    seen = [next(reading).step]
    for full in rotated_files(path)[:-1]:
        full.unlink()  # the run continues and keeps one full file
    seen += [r.step for r in reading]
    assert seen[0] == 1 and seen[-1] == 400 and len(seen) < 400
    assert "rotated files were deleted before being read" in caplog.text


def test_loggers_get_watched_values_and_no_name_is_both_metric_and_folder() -> None:
    watch = {
        "tensor_norms": {"head.weight": 2.0},
        "zero_share": {"head.weight": 0.5},
        "update_ratio": {"head.weight": 1e-3},
        "noise_scale": 4.0,
        "replica_drift": {"gradients": [], "weights": [2]},
        "underflow": {"float16": 0.25, "exponents": {"-15": 1}},
    }
    values = scalars(StepRecord(1, 2.0, 1.0, "applied", lr=0.1, watch=watch))
    plain = scalars(StepRecord(1, 2.0, 1.0, "applied", lr=0.1))
    assert {name: v for name, v in values.items() if name not in plain} == {
        "train/grad_norms/head.weight": 2.0,
        "train/update_ratios/head.weight": 1e-3,
        "train/underflow/float16": 0.25,
        "train/noise_scale": 4.0,
        "train/replica_drift": 1.0,
    }
    assert not [name for name in values if any(other.startswith(f"{name}/") for other in values)]
