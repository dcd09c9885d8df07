"""The files of a `JsonLinesSink` when they are full, truncated, closed, or not writable."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

import fastguard
from fastguard import JsonLinesSink, StepRecord, read_records
from fastguard.records.rotated_files import rotated_files


def record(step: int, tag: object = None) -> StepRecord:
    return StepRecord(step, 1.0, 1.0, "applied", lr=0.5, tag=tag)


def steps(path: Path) -> list[int]:
    return [r.step for r in read_records(path)]


def n_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_is_filled_to_its_last_byte_and_never_empty(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl", max_bytes=1 << 20) as sink:
        sink(record(1))
    header, line = map(len, sink.path.read_bytes().splitlines(keepends=True))
    sink.path.unlink()
    size = header + 20 * line + 8  # the time in a header may have more digits
    with JsonLinesSink(sink.path, max_bytes=size) as sink:
        for _ in range(40):
            sink(record(1))
        sink(record(2, tag="x" * 30 * line))  # larger than max_bytes: gets its own file
    assert [p.stat().st_size for p in rotated_files(sink.path)] == pytest.approx(
        [size, size], abs=16
    )
    assert steps(sink.path) == [1] * 40 + [2]
    with JsonLinesSink(tmp_path / "new.jsonl", max_bytes=1024) as sink:
        sink(record(1, tag="x" * 2000))
    assert rotated_files(sink.path) == []


def test_rotated_files_are_distinguished_from_other_files(tmp_path: Path) -> None:
    (tmp_path / "records.notes").write_text("not mine")
    (tmp_path / "records.7").write_text("")  # numbers continue after the last existing one
    with JsonLinesSink(tmp_path / "records", max_bytes=1024) as sink:
        for step in range(1, 12):
            sink(record(step))
    names = [p.name for p in rotated_files(sink.path)]
    assert len(names) > 2 and names == [f"records.{7 + i}" for i in range(len(names))]
    assert steps(sink.path) == list(range(1, 12))


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = n_open()
    with JsonLinesSink(tmp_path / "r.jsonl", max_bytes=1024) as sink:
        for step in range(60):
            sink(record(step))
        assert n_open() == before + 1
    assert n_open() == before


def test_a_closed_sink_writes_to_no_other_file(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "r.jsonl", max_bytes=1024)
    for step in range(7):
        sink(record(step))
    sink.close()
    # Gets the descriptor that was closed.
    with open(tmp_path / "other", "wb", buffering=0) as other:
        for step in range(7):
            sink(record(step))
        sink.close()
        assert other.tell() == 0
    assert sink.lost == 7 and steps(sink.path) == list(range(7))
    assert (tmp_path / "other").read_bytes() == b""


def test_closing_flushes_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_ino), fsync(fd)))
    with JsonLinesSink(tmp_path / "r.jsonl") as sink:
        sink(record(1))
    assert flushed == [sink.path.stat().st_ino]


def test_a_failed_rotation_loses_no_record_and_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    sink = JsonLinesSink(tmp_path / "r.jsonl", max_bytes=1024)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        for step in range(1, 9):
            sink(record(step))
    assert sink.path.stat().st_size > 2048
    assert caplog.text.count("so it grows beyond max_bytes") == 1
    sink(record(9))
    sink.close()
    assert sink.lost == 0
    assert len(rotated_files(sink.path)) == 1
    assert steps(sink.path) == list(range(1, 10))


def test_a_truncated_line_loses_no_other_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl") as sink:
        sink(record(1))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        room = sink.path.stat().st_size + 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            sink(record(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sink(record(3))
    assert sink.lost == 1
    assert "only 20 of" in caplog.text
    assert steps(sink.path) == [1, 3]


def test_a_file_that_cannot_be_opened_is_not_left_open(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"step": 9' * 10)  # truncated, with no room to end the line
    before = n_open()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            JsonLinesSink(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert n_open() == before


def test_a_file_name_that_is_not_utf8_can_be_a_tag(tmp_path: Path) -> None:
    tag = os.fsdecode(b"batch-\xff.pt")
    with JsonLinesSink(tmp_path / "r.jsonl") as sink:
        sink(record(1, tag=tag))
    (read,) = read_records(sink.path, strict=True)
    assert read.tag == tag


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    says = r"is a folder; name a file in it, such as .*records\.jsonl"
    with pytest.raises(IsADirectoryError, match=says):
        JsonLinesSink(tmp_path)
    with pytest.raises(IsADirectoryError, match=says):
        JsonLinesSink(f"{tmp_path}/runs/")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(IsADirectoryError, match=says):
        list(read_records(tmp_path))


def test_a_class_is_not_a_sink() -> None:
    opt = fastguard.GuardedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    with pytest.raises(
        TypeError, match=r"sink is the class JsonLinesSink.*JsonLinesSink\(\.\.\.\)"
    ):
        opt.add_sink(fastguard.JsonLinesSink)


@pytest.mark.parametrize("form", [str, Path])
def test_the_path_of_a_file_makes_a_sink(form: type, tmp_path: Path) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.1))
    sink = opt.add_sink(form(tmp_path / "run" / "records.jsonl"))
    assert isinstance(sink, JsonLinesSink)
    opt.step(loss=1.0)
    sink.close()
    assert steps(sink.path) == [1]
    with pytest.raises(TypeError, match=r"sink='run/' is a path without .jsonl.*records.jsonl"):
        opt.add_sink("run/")
