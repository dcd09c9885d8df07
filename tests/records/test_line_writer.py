"""A file has one writer, which threads share; other processes get an error."""

from __future__ import annotations

import itertools
import os
import pickle
import resource
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fastguard import JsonLinesSink, StepRecord, read_records
from fastguard.records.line_writer import LineWriter
from fastguard.records.rotated_files import rotated_files


def record(step: int, tag: object = None) -> StepRecord:
    return StepRecord(step, 1.0, 1.0, "applied", lr=0.5, tag=tag)


def steps(path: Path) -> list[int]:
    return [r.step for r in read_records(path, strict=True)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def test_a_resumed_run_continues_its_file(path: Path) -> None:
    for step in (1, 2, 3):
        with JsonLinesSink(path, max_bytes=1024) as sink:
            sink(record(step))
    assert steps(path) == [1, 2, 3]


def test_sinks_of_one_process_share_a_file_and_the_last_one_closes_it(path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    first, second = JsonLinesSink(path, max_bytes=2000), JsonLinesSink(path, max_bytes=2000)
    for step in range(1, 41):
        (first if step % 2 else second)(record(step))
    first.close()
    first.close()
    second(record(41))
    first(record(-1))
    second.close()
    assert (first.lost, second.lost) == (1, 0)
    assert steps(path) == list(range(1, 42))
    assert len(rotated_files(path)) > 3
    assert os.listdir("/proc/self/fd") == before


def test_threads_that_share_a_sink_lose_no_record(path: Path, tmp_path: Path) -> None:
    n, n_threads = 300, 4
    sink = JsonLinesSink(path, max_bytes=2000)
    stop, spoiled = threading.Event(), []

    def write(k: int) -> None:
        for step in range(n):
            sink(record(step, tag=k))

    def others() -> None:
        while not stop.is_set():
            file = os.open(tmp_path / "weights", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.write(file, b"weights" * 10)
            spoiled.append(os.pread(file, 1000, 0) != b"weights" * 10)
            os.close(file)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=write, args=(k,)) for k in range(n_threads)]
        other = threading.Thread(target=others)
        for thread in (*threads, other):
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        other.join()
    finally:
        sys.setswitchinterval(interval)
    sink.close()
    assert sink.lost == 0 and not any(spoiled)
    found = list(read_records(path, strict=True))
    for k in range(n_threads):
        assert [r.step for r in found if r.tag == k] == list(range(n))


def test_records_after_the_close_of_another_thread_are_counted(path: Path) -> None:
    sink = JsonLinesSink(path, max_bytes=2000)

    def write() -> None:
        for step in range(500):
            sink(record(step))

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    sink.close()
    for thread in threads:
        thread.join()
    n = len(steps(path)) if path.exists() else 0
    assert n + sink.lost == 1500


def test_the_working_directory_may_change(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    sink = JsonLinesSink("records.jsonl", max_bytes=1024)
    (path.parent / "elsewhere").mkdir()
    monkeypatch.chdir(path.parent / "elsewhere")
    twin = pickle.loads(pickle.dumps(sink))
    for step in range(1, 20):
        (sink if step % 2 else twin)(record(step))
    twin.close()
    sink.close()
    assert steps(path) == list(range(1, 20)) and os.listdir() == []


def test_a_descriptor_closed_by_other_code_is_not_used(path: Path, tmp_path: Path) -> None:
    sink = JsonLinesSink(path)
    sink(record(1))
    os.close(sink._writer._file)
    with open(tmp_path / "weights", "wb", buffering=0) as other:  # gets the same descriptor
        sink(record(2))
        assert other.tell() == 0
        sink.close()
        assert not other.closed and other.write(b"x") == 1
    assert steps(path) == [1, 2] and sink.lost == 0


def test_a_file_deleted_or_truncated_by_hand_is_restarted(path: Path) -> None:
    sink = JsonLinesSink(path, max_bytes=1500)
    for step in (1, 2):
        sink(record(step))
    path.unlink()
    sink(record(3))
    assert steps(path) == [3]
    os.truncate(path, 0)
    for step in (4, 5, 6):  # the new file is small, so it is not rotated
        sink(record(step))
    assert steps(path) == [4, 5, 6] and rotated_files(path)[:1] == []
    sink.close()


def test_a_file_that_was_moved_away_by_hand_is_not_renamed_again(path: Path) -> None:
    sink = JsonLinesSink(path, max_bytes=1500)
    sink(record(1))
    path.rename(path.with_name("kept.jsonl"))
    path.write_text("not ours\n")
    for step in range(2, 6):
        sink(record(step))
    sink.close()
    assert path.read_text().startswith("not ours\n")
    moved = [r.step for r in read_records(path.with_name("kept.jsonl"))]
    assert moved + [r.step for r in read_records(path)] == list(range(1, 6)) and sink.lost == 0


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe"])
def test_a_pipe_or_device_is_not_a_file_of_records(path: Path, kind: str) -> None:
    target = path.with_name("target") if kind == "link to a pipe" else path
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(target)
        if target != path:
            path.symlink_to(target)
    with pytest.raises(OSError, match="not a regular file"):
        JsonLinesSink(path)
    assert not LineWriter._all


def test_a_record_written_by_a_signal_handler_during_a_write_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may take a step while a line is written, or between two files."""
    sink = JsonLinesSink(path, max_bytes=1024)
    extra = itertools.count(1000)

    def interrupted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            result = function(*args, **kwargs)
            if not handling:
                handling.append(1)
                sink(record(next(extra)))
                handling.clear()
            return result

        return call

    handling: list[int] = []
    for name in ("write", "open", "fstat", "stat", "rename", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted(getattr(os, name)))
            for step in range(1, 9):
                sink(record(step))
    sink.close()
    found = Counter(steps(path))
    n_extra = next(extra) - 1000
    assert n_extra > 40
    assert [found[step] for step in range(1, 9)] == [6] * 8 and sink.lost == 0
    assert sum(found.values()) == 48 + n_extra
    for file in (path, *rotated_files(path)):
        assert file.read_bytes().startswith(b'{"kind": "header"')


def test_a_full_file_that_cannot_be_deleted_loses_no_record(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    with JsonLinesSink(path, max_bytes=1024, keep=1) as sink:
        for step in range(1, 31):
            sink(record(step))
    assert steps(path) == list(range(1, 31)) and sink.lost == 0
    assert "cannot delete a full file" in caplog.text


def test_without_free_descriptors_the_full_file_grows(path: Path) -> None:
    sink = JsonLinesSink(path, max_bytes=2048)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        for step in range(1, 7):
            sink(record(step))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    sink(record(7))
    sink.close()
    assert steps(path) == list(range(1, 8)) and sink.lost == 0
    assert len(rotated_files(path)) == 1
