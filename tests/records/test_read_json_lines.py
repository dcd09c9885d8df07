"""Record files of any size and state are read completely, in order, with bounded memory."""

import json
import os

import pytest

from fastguard import JsonLinesSink, StepRecord, read_records
from fastguard.commands.run_files import find_run
from fastguard.records import read_json_lines as rf

NAN, INF = float("nan"), float("inf")


def record(step, **more):
    return StepRecord(step, 1.0, 1.0, "applied", losses={"loss": 0.5}, lr=0.1, **more)


def line_of(step, **more):
    """Returns a minimal record as a line, with optional further fields."""
    least = {"step": step, "total_norm": 1.0, "clip_coef": 1.0, "action": "applied"}
    return json.dumps(least | more).encode()


def steps(path, **options):
    return [r["step"] for block in rf.read_blocks(path, **options) for r in block.records]


def damaged(path, **options):
    return sum(block.damaged for block in rf.read_blocks(path, **options))


def write(path, count, **options):
    with JsonLinesSink(path, **options) as sink:
        for step in range(1, count + 1):
            sink(record(step, tag="ü" * (step % 7)))
    return path


@pytest.mark.parametrize("block_bytes", [700, 1000, 1 << 22])  # a record has 300
def test_every_record_is_read_once_and_in_order_for_any_block_size(block_bytes, tmp_path):
    path = write(tmp_path / "run.jsonl", 100)
    assert steps(path, block_bytes=block_bytes) == list(range(1, 101))
    blocks = list(rf.read_blocks(path, block_bytes=block_bytes))
    assert sum(block.size for block in blocks) == path.stat().st_size
    assert damaged(path, block_bytes=block_bytes) == 0


def test_rotated_files_are_one_run(tmp_path):
    path = write(tmp_path / "run.jsonl", 100, max_bytes=2048)
    assert (tmp_path / "run.11.jsonl").exists()  # more than nine: order is by number, not by name
    assert steps(path) == [r.step for r in read_records(path)] == list(range(1, 101))


def test_a_run_without_its_current_file_is_read(tmp_path):
    path = write(tmp_path / "run.jsonl", 5)
    path.rename(tmp_path / "run.1.jsonl")
    assert find_run(path) == path
    assert steps(path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "total_norm": 1.0, "clip_co',
        b"\0" * 500,
        b"\xff\xfe not text",
        b"[1, 2]",
        b'{"total_norm": 1.0}',
        line_of("two"),
        line_of(2.5),
        line_of(True),
        line_of(-1),
        line_of(123456789012345678901234567890),
        line_of(2) + b", " + line_of(3),
        line_of(2) + b" " + line_of(3),
        b'{"step": 2, "loss": 0.5}',
        line_of(2, action=None),
        line_of(2, total_norm=True),
        line_of(2, clip_coef=[1]),
        b"[" * 100_000,
        b"null",
        b'"',
    ],
    ids=lambda line: line[:70].decode("latin1").replace("\0", "NUL"),
)
@pytest.mark.parametrize("place", ["first", "middle", "last", "last, unfinished"])
def test_lines_that_are_not_records_are_counted_and_skipped(line, place, tmp_path):
    good = [json.dumps(record(step).as_dict()).encode() for step in (1, 4)]
    at = {"first": 0, "middle": 1}.get(place, 2)
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\n".join([*good[:at], line, *good[at:]]))
    if place != "last, unfinished":
        with path.open("ab") as file:
            file.write(b"\n")
    assert steps(path) == [1, 4]
    assert damaged(path) == 1


def test_the_most_clipped_unit_is_read_as_it_was_written(tmp_path):
    given = [
        record(1, clipped_units=2, limited_units=9, most_clipped_unit=("head.weight", 3)),
        record(2, limited_units=9),
    ]
    with JsonLinesSink(tmp_path / "run.jsonl") as sink:
        for each in given:
            sink(each)
    assert list(rf.read_records(tmp_path / "run.jsonl")) == given


@pytest.mark.parametrize("unit", ["head", ["head"], ["head", -1], ["head", 0.5], 3])
def test_an_invalid_unit_is_no_record(unit):
    with pytest.raises(ValueError):
        rf.parse_record(line_of(1, most_clipped_unit=unit))


def test_two_damaged_lines_never_make_a_record(tmp_path):
    path = tmp_path / "run.jsonl"
    halves = b'{"step": 1, "tag": "a\nb"}', b'{"step": 2, "culprits": [1', line_of(3), b"]}"
    path.write_bytes(b"\n".join(halves))
    assert steps(path) == [3]
    assert damaged(path) == 4


def test_numbers_outside_strict_json_are_read(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(line_of(1, lr=NAN) + b"\n" + line_of(2, total_norm=INF) + b"\n")
    assert steps(path) == [1, 2]
    assert damaged(path) == 0


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  \n\r\n", line_of(1) + b"\r\n\r\n"])
def test_blank_lines_are_ignored(content, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    assert steps(path) == ([1] if b"step" in content else [])
    assert damaged(path) == 0


def test_an_endless_line_takes_no_memory(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\n".join([line_of(1), b"x" * 10_000, line_of(2), b"y" * 10_000]))
    assert steps(path, block_bytes=500) == [1, 2]
    assert damaged(path, block_bytes=500) == 2


def test_reading_without_orjson_gives_the_same_records(tmp_path, monkeypatch):
    path = write(tmp_path / "run.jsonl", 100)
    with path.open("ab") as file:
        file.write(line_of(101, lr=NAN) + b'\n{"st')
    before = [block.records for block in rf.read_blocks(path)]
    monkeypatch.setattr(rf, "_loads", json.loads)
    after = [block.records for block in rf.read_blocks(path)]
    assert repr(before) == repr(after)  # a NaN does not equal itself


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")
def test_no_file_stays_open(tmp_path):
    path = write(tmp_path / "run.jsonl", 100, max_bytes=2048)
    before = len(os.listdir("/proc/self/fd"))
    reading = rf.read_blocks(path, block_bytes=700)
    next(reading)
    reading.close()
    assert len(os.listdir("/proc/self/fd")) == before
