"""Every file of records begins with a header, which readers skip, and every record has a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import resource
import time
from pathlib import Path

import pytest
import torch

import fastguard
from fastguard import GuardedOptimizer, JsonLinesSink, StepRecord, read_records
from fastguard.records.read_json_lines import parse_record, read_blocks
from fastguard.records.rotated_files import rotated_files
from fastguard.records.run_header import RunHeader, header_of, is_header, parse_header


def record(step: int) -> StepRecord:
    return StepRecord(step, 1.0, 1.0, "applied", lr=0.5)


def guarded(**settings) -> GuardedOptimizer:
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    return GuardedOptimizer(torch.optim.SGD([p], lr=0.1), **settings)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_file_begins_with_a_header(tmp_path: Path) -> None:
    opt = guarded(max_norm=2.5)
    before = time.time()
    opt.add_sink(JsonLinesSink(tmp_path / "r.jsonl", name="run 7"))
    opt.step()
    opt.step()
    header, *records = lines_of(tmp_path / "r.jsonl")
    assert list(header) == [
        "kind", "fastguard", "name", "time", "python", "torch", "triton", "host", "device",
        "guards",
    ]  # fmt: skip
    assert (header["kind"], header["name"], header["device"]) == ("header", "run 7", "cpu")
    assert header["fastguard"] == fastguard.__version__
    assert header["torch"] == torch.__version__
    assert header["python"] == platform.python_version()
    assert header["host"] == platform.node()
    assert header["guards"] == [opt.describe()] and "max_norm=2.5" in opt.describe()
    assert before <= header["time"] <= records[0]["time"] <= records[1]["time"] <= time.time()
    assert [r["step"] for r in records] == [1, 2]


def test_the_host_can_be_left_out(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl", host=False) as sink:
        sink(record(1))
    header = lines_of(sink.path)[0]
    assert header["host"] is None
    assert platform.node() not in sink.path.read_text("utf-8") or len(platform.node()) < 3


@pytest.mark.parametrize(
    "wrong, message", [({"name": 7}, "name=7 must be the name"), ({"host": "x"}, "host='x' must")]
)
def test_arguments_of_another_type_are_refused(tmp_path: Path, wrong, message) -> None:
    with pytest.raises(TypeError, match=message):
        JsonLinesSink(tmp_path / "r.jsonl", **wrong)
    assert not (tmp_path / "r.jsonl").exists()


def test_each_rotated_file_begins_with_a_header(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl", max_bytes=2048, name="long") as sink:
        for step in range(1, 31):
            sink(record(step))
    files = [*rotated_files(sink.path), sink.path]
    assert len(files) > 3
    for file in files:
        first, *rest = lines_of(file)
        assert is_header(first) and first["name"] == "long"
        assert rest and not any(map(is_header, rest))
        assert file.stat().st_size <= 2048
    assert [r.step for r in read_records(sink.path, strict=True)] == list(range(1, 31))


def test_a_rotation_that_fails_repeats_no_header(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with (
        JsonLinesSink(tmp_path / "r.jsonl", max_bytes=1024) as sink,
        monkeypatch.context() as patch,
    ):
        patch.setattr("os.rename", refuse)
        for step in range(8):
            sink(record(step))
    assert [is_header(line) for line in lines_of(sink.path)] == [True] + 8 * [False]


def test_a_resumed_run_has_a_second_header_with_its_own_settings(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for limit in (1.0, 2.0):
        opt = guarded(max_norm=limit)
        sink = opt.add_sink(path)
        opt.step()
        sink.close()  # type: ignore[attr-defined]
    kinds = [is_header(line) for line in lines_of(path)]
    assert kinds == [True, False, True, False]
    assert "max_norm=2.0" in lines_of(path)[2]["guards"][0]
    assert len(list(read_records(path, strict=True))) == 2


def test_a_sink_of_two_optimizers_names_both(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "r.jsonl")
    generator, critic = guarded(max_norm=1.0), guarded(max_norm=5.0)
    generator.add_sink(sink)
    critic.add_sink(sink)
    generator.step()
    critic.step()
    assert lines_of(sink.path)[0]["guards"] == [generator.describe(), critic.describe()]
    assert [is_header(line) for line in lines_of(sink.path)] == [True, False, False]


def test_a_file_deleted_during_a_run_begins_with_a_header_again(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl") as sink:
        sink(record(1))
        sink.path.unlink()
        sink(record(2))
    assert [is_header(line) for line in lines_of(sink.path)] == [True, False]


def test_blocks_have_the_headers_and_the_same_records(tmp_path: Path) -> None:
    for start in (1, 20):
        with JsonLinesSink(tmp_path / "r.jsonl", name=f"from {start}") as sink:
            for step in range(start, start + 10):
                sink(record(step))
    for block_bytes in (900, 1 << 20):
        blocks = list(read_blocks(sink.path, block_bytes=block_bytes))
        assert [h["name"] for b in blocks for h in b.headers] == ["from 1", "from 20"]
        assert [r["step"] for b in blocks for r in b.records] == [*range(1, 11), *range(20, 30)]
        assert sum(b.damaged for b in blocks) == 0
        assert sum(b.size for b in blocks) == sink.path.stat().st_size
    with sink.path.open("a") as file:
        file.write('{"kind": "header", "fastg')  # a header cut short is a damaged line
    blocks = list(read_blocks(sink.path))
    assert sum(len(b.records) for b in blocks) == 20 and sum(b.damaged for b in blocks) == 1


@pytest.mark.parametrize(
    "line",
    [b'{"kind": "header"}', b'{"kind": "run", "fastguard": "1"}', b"[1]", b"{", b"[" * 100_000],
    ids=["no version", "another kind", "list", "cut", "deep"],
)
def test_other_lines_are_no_headers(line: bytes) -> None:
    assert parse_header(line) is None


def test_an_untrusted_header_is_bounded_and_printable() -> None:
    found = header_of(
        {
            "kind": "header",
            "fastguard": "9\x1b[2J",
            "name": "x" * 10_000,
            "time": "soon",
            "torch": 3,
            "guards": [5, "g" * 10_000, *map(str, range(100))],
        }
    )
    assert "\x1b" not in found.fastguard and len(found.name or "") <= 2000
    assert found.time is None and found.torch is None
    assert len(found.guards) <= 16 and len(found.guards[0]) <= 2000
    assert header_of({"fastguard": "1", "time": math.inf}).time is None
    assert header_of({"fastguard": "1", "guards": None}) == RunHeader("1")


def test_a_record_has_the_time_of_its_step() -> None:
    opt = guarded()
    before = time.time()
    opt.step()
    between = time.time()
    opt.step(loss=float("nan"))
    first, second = opt.records()
    assert before <= first.time <= between <= second.time <= time.time()


def test_records_that_differ_only_in_time_are_equal() -> None:
    assert record_at(5.0) == record_at(7.0)
    assert parse_record(json.dumps(record_at(7.25).as_dict()).encode()).time == 7.25


def record_at(seconds: float) -> StepRecord:
    return dataclasses.replace(record(1), time=seconds)


def test_a_record_without_a_time_can_still_be_read() -> None:
    old = {"step": 1, "total_norm": 1.0, "clip_coef": 1.0, "action": "applied"}
    assert math.isnan(parse_record(json.dumps(old).encode()).time)


def test_a_pickled_sink_keeps_its_name(tmp_path: Path) -> None:
    import pickle

    with JsonLinesSink(tmp_path / "r.jsonl", name="mine", host=False) as sink:
        copied = pickle.loads(pickle.dumps(sink))
    with copied:
        copied(record(1))
    assert (lines_of(sink.path)[0]["name"], lines_of(sink.path)[0]["host"]) == ("mine", None)


def test_a_header_needs_no_free_descriptor(tmp_path: Path) -> None:
    """The header contains the version of triton, which is read from a file."""
    sink = JsonLinesSink(tmp_path / "r.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        sink(record(1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    sink.close()
    assert sink.lost == 0
    assert [is_header(line) for line in lines_of(sink.path)] == [True, False]
