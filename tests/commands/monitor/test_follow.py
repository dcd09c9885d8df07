"""`Follower` reads every line once, across rotation, replacement and truncation."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard import JsonLinesSink, StepRecord
from fastguard.commands.monitor import follow
from fastguard.commands.monitor.follow import BLOCK, Follower, Lines
from fastguard.records.read_json_lines import parse_record
from fastguard.records.run_header import begins_as_header
from guardtest.rotation import ROTATIONS, Rotation


def steps(lines: Iterable[bytes]) -> list[int]:
    return [parse_record(line).step for line in lines if not begins_as_header(line)]


def write(path: Path, *numbers: int, mode: str = "ab") -> None:
    with path.open(mode) as file:
        for number in numbers:
            file.write(b"%d\n" % number)


def read(follower: Follower) -> list[int]:
    return [int(line) for line in follower.poll()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "r.jsonl"


def test_old_and_new_lines_are_read(path: Path) -> None:
    write(path, 1, 2, 3, 4, 5)
    follower = Follower(path)
    assert read(follower) == [1, 2, 3, 4, 5]
    assert read(follower) == []
    write(path, 6, 7)
    assert read(follower) == [6, 7]


def test_a_line_is_read_once_it_is_complete(path: Path) -> None:
    write(path, 1)
    follower = Follower(path)
    with path.open("ab", buffering=0) as file:
        file.write(b"2")
        assert read(follower) == [1]
        file.write(b"3\n4")
        assert read(follower) == [23]
    assert list(follower.finish()) == [b"4"] and list(follower.finish()) == []


def test_the_oldest_rotated_file_is_read_first(path: Path) -> None:
    write(path.with_name("r.9.jsonl"), 1, 2)
    write(path.with_name("r.10.jsonl"), 3, 4)
    write(path, 5)
    assert read(Follower(path)) == [1, 2, 3, 4, 5]


def test_the_current_file_may_be_missing_after_a_rotation(path: Path) -> None:
    write(path.with_name("r.1.jsonl"), 1, 2)
    follower = Follower(path)
    assert read(follower) == [1, 2]
    write(path, 3)
    assert read(follower) == [3]


def test_a_file_may_be_created_later(path: Path) -> None:
    follower = Follower(path)
    assert read(follower) == [] and follower.age(time.time()) is None
    write(path, 1, 2, 3, 4, 5)
    assert read(follower) == [1, 2, 3, 4, 5]
    assert follower.age(time.time() + 60) >= 60


def test_several_rotations_between_two_polls(path: Path) -> None:
    write(path, 1)
    follower = Follower(path)
    assert read(follower) == [1]
    write(path, 2)
    path.rename(path.with_name("r.1.jsonl"))
    write(path, 3)
    path.rename(path.with_name("r.2.jsonl"))
    write(path, 4)
    path.rename(path.with_name("r.3.jsonl"))
    assert read(follower) == [2, 3, 4]
    write(path, 5)
    assert read(follower) == [5]


def test_files_deleted_after_a_rotation_are_skipped(path: Path) -> None:
    write(path, 1)
    follower = Follower(path)
    write(path, 2)
    path.unlink()  # the sink keeps one rotated file and has written two newer ones
    write(path.with_name("r.3.jsonl"), 5)
    write(path, 6)
    assert read(follower) == [1, 2, 5, 6]  # the open file is still readable after its deletion


def test_an_incomplete_line_ends_with_its_file(path: Path) -> None:
    write(path, 1)
    follower = Follower(path)
    with path.open("ab") as file:
        file.write(b"2")
    path.rename(path.with_name("r.1.jsonl"))
    write(path, 3)
    assert read(follower) == [1, 2, 3]


@pytest.mark.parametrize("how", ["replaced", "deleted-and-made-anew", "truncated"])
def test_a_new_run_under_the_same_name_is_read_from_the_start(path: Path, how: str) -> None:
    write(path, 1, 2, 3)
    follower = Follower(path)
    assert read(follower) == [1, 2, 3]
    if how == "replaced":
        write(path.with_name("new"), 7)
        path.with_name("new").replace(path)
    elif how == "truncated":
        write(path, 7, mode="wb")
    else:
        path.unlink()
        assert read(follower) == []
        write(path, 7)
    assert read(follower) == [7]
    write(path, 8)
    assert read(follower) == [8]


WRITER = """
import sys, time
from fastguard import JsonLinesSink, StepRecord
with JsonLinesSink(sys.argv[1], max_bytes=5000) as sink:
    for step in range(1, int(sys.argv[2]) + 1):
        sink(StepRecord(step, 1.0, 1.0, "applied", lr=0.5))
        if step % 10 == 0:
            time.sleep(0.001)  # lets the readers read in between
"""


def test_no_line_is_lost_or_repeated_while_a_process_writes_and_rotates(path: Path) -> None:
    follower = Follower(path)
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "2000"])
    seen: list[int] = []
    while process.poll() is None:
        seen += steps(follower.poll())
    seen += steps(follower.poll())
    assert process.returncode == 0
    assert seen == list(range(1, 2001))
    assert len(os.listdir(path.parent)) > 50  # it has rotated many times


def test_a_follower_may_start_while_a_process_writes_and_rotates(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "600"])
    while not path.exists():
        time.sleep(0.01)
    followers = [Follower(path) for _ in range(15)]
    process.wait()
    for follower in followers:
        seen = steps(follower.poll())
        assert seen == list(range(1, 601))


@pytest.mark.parametrize("when", ["at-its-beginning", "when-it-goes-on"])
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_a_rotation_during_listing_loses_no_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, when: str, rotation: Rotation
) -> None:
    write(path.with_name("r.1.jsonl"), 1)
    write(path, 2, 3)
    if when == "at-its-beginning":
        rotation.comes(monkeypatch, path, follow)
        follower, seen = Follower(path), []
    else:
        follower = Follower(path)
        seen = read(follower)
        path.rename(path.with_name("r.2.jsonl"))
        write(path, 4)
        rotation.comes(monkeypatch, path, follow)
    seen += read(follower)
    monkeypatch.undo()
    last = rotation.last(path)
    write(path, last + 1)
    seen += read(follower)
    assert seen == list(range(1, last + 2))


def test_age_is_the_time_since_the_last_write(path: Path) -> None:
    with JsonLinesSink(path) as sink:
        sink(StepRecord(1, 1.0, 1.0, "applied"))
    os.utime(path, (1000, 1000))
    assert Follower(path).age(1060.0) == 60.0
    assert Follower(path).age(900.0) == 0.0  # the clocks of two machines may differ


DATA = st.lists(st.sampled_from([b"\n", b"a", b"bc", b"\r", b"\x00"]), max_size=60).map(b"".join)


@given(DATA, st.lists(st.integers(1, 7)))
def test_lines_are_joined_across_chunks(data: bytes, sizes: list[int]) -> None:
    lines, found, at = Lines(), [], 0
    for size in [*sizes, len(data)]:
        found += lines.feed(data[at : at + size])
        at += size
    *whole, rest = data.split(b"\n")
    assert found == whole and lines.flush() == rest and lines.flush() == b""


@pytest.mark.parametrize("pieces", [1, 3], ids=["one-chunk", "three-chunks"])
def test_an_endless_line_is_abandoned_and_returned_once(pieces: int) -> None:
    lines = Lines()
    long = b"x" * (BLOCK + 3)
    step = -(-len(long) // pieces)
    found = [line for at in range(0, len(long), step) for line in lines.feed(long[at : at + step])]
    assert found == [long]
    assert lines.feed(b"more of it") == []
    assert lines.feed(b" and its end\nnext\n") == [b"next"]
