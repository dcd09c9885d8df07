"""`fastguard monitor --once`: output for scripts and exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastguard import JsonLinesSink, StepRecord
from fastguard.commands.cli import main
from fastguard.commands.monitor import command
from fastguard.commands.monitor.run_state import RunState
from fastguard.records.rotated_files import rotated_files

N = 2000
INCIDENT = 1500


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with JsonLinesSink(tmp_path / "records.jsonl", max_bytes=100_000) as sink:
        for step in range(1, N + 1):
            bad = step == INCIDENT
            sink(
                StepRecord(
                    step,
                    1.0,
                    1.0,
                    "skipped" if bad else "applied",
                    "nonfinite_loss" if bad else None,
                    losses={"seg": float("nan") if bad else 0.5},
                    consecutive_skips=int(bad),
                    lr=1e-3,
                    tag=["epoch 3", step],
                )
            )
    return sink.path


@pytest.mark.parametrize(
    "last, status", [(N - INCIDENT, 0), (N - INCIDENT + 1, 1), (N, 1), (1_000_000, 1), (1, 0)]
)
def test_the_exit_status_shows_incidents_in_the_last_steps(path, last, status, capsys) -> None:
    assert main(["monitor", str(path), "--once", "--last", str(last)]) == status
    printed = capsys.readouterr().out
    assert ("step 1500 skipped (tag ['epoch 3', 1500])" in printed) == (status == 1)
    assert f"in the last {min(last, N):,} step" in printed


def test_the_json_is_complete_and_strict(path, capsys) -> None:
    assert main(["monitor", str(path.parent), "--once", "--json"]) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    result = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert result["file"] == str(path) and 0 <= result["age_s"] < 600
    assert result["latest"]["step"] == N
    assert result["records"] == 1000 and result["actions"] == {"applied": 999, "skipped": 1}
    assert result["n_incidents"] == 1 and result["reasons"] == {"nonfinite_loss": 1}
    assert result["incidents"][0]["losses"] == {"seg": "NaN"}


def test_damaged_and_half_written_lines_are_counted(path, capsys) -> None:
    with path.open("ab") as file:
        file.write(b'\x00\x01\n[]\n{"step": 2001, "total_no')
    assert main(["monitor", str(path), "--once", "--last", "10"]) == 0
    printed = capsys.readouterr().out
    assert "7 applied, 3 damaged lines" in printed and "step 2,000" in printed


def test_a_last_record_without_a_newline_is_counted(path, capsys) -> None:
    path.write_text('{"step": 1, "total_norm": 1, "clip_coef": 1, "action": "applied"}')
    assert main(["monitor", str(path), "--once", "--last", "1"]) == 0
    assert "1 applied\n" in capsys.readouterr().out


def test_a_run_without_a_step_yet_exits_with_2(tmp_path, capsys) -> None:
    (tmp_path / "r.jsonl").touch()
    assert main(["monitor", str(tmp_path), "--once"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        "r.jsonl is empty: no step has been recorded yet; use fastguard monitor --wait"
        in captured.err
    )
    assert main(["monitor", str(tmp_path), "--once", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["latest"] is None


def once_while_a_run_begins(path) -> int:
    """The exit status of `monitor --once --wait` on a run that writes its first record later."""

    def begin() -> None:
        time.sleep(0.3)
        with JsonLinesSink(path) as sink:
            sink(StepRecord(1, 1.0, 1.0, "applied"))

    thread = threading.Thread(target=begin)
    thread.start()
    status = main(["monitor", str(path), "--once", "--wait", "--interval", "0.05"])
    thread.join()
    return status


def test_wait_waits_for_the_first_record_of_an_empty_file(tmp_path, capsys) -> None:
    path = tmp_path / "r.jsonl"
    path.touch()

    status = once_while_a_run_begins(path)
    assert status == 0 and "1 applied" in capsys.readouterr().out


def test_incidents_before_the_window_do_not_change_the_exit_status(
    path, capsys, monkeypatch
) -> None:
    state = RunState(last=3)
    for file in [*rotated_files(path), path]:
        for line in file.read_bytes().splitlines():
            state.feed(line)  # like the live screen
    assert state.n_incidents == 1
    monkeypatch.setattr(command, "_once", lambda args: state)
    assert main(["monitor", str(path), "--once"]) == 0


@pytest.mark.parametrize(
    "args, message",
    [
        (["missing.jsonl", "--once"], "no such file: missing.jsonl"),
        (["missing", "--once"], "no such file: missing"),
        (["empty", "--once"], "no .jsonl file"),
        (["two", "--once"], "several runs (a.jsonl, b.jsonl)"),
        (["train.log", "--once"], "use: fastguard scan"),
        (["/dev/null", "--once"], "not a regular file"),
        (["two/a.jsonl", "--json"], "add --once"),
        (["two/a.jsonl"], "use --once"),
        (["two/a.jsonl", "--once", "--last", "0"], "0 is not between 1 and 1000000"),
        (["two/a.jsonl", "--interval", "0"], "0 is not between 0.05 and 3600"),
        (["two/a.jsonl", "--interval", "soon"], "'soon' is not a number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_usage_error_is_one_line_with_status_2(
    args, message, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.jsonl").touch()
    (tmp_path / "two" / "b.jsonl").touch()
    (tmp_path / "train.log").write_text("epoch 1 loss nan\n")
    assert main(["monitor", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_wait_waits_for_the_run_to_start(tmp_path, capsys) -> None:
    path = tmp_path / "run" / "records.jsonl"

    status = once_while_a_run_begins(path)
    assert status == 0
    assert str(path) in capsys.readouterr().out


PEAK = """
import resource, sys
from fastguard.commands.cli import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
main(["monitor", sys.argv[1], "--once", "--last", "1000"])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("kB", after - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_memory_does_not_grow_with_the_file(tmp_path) -> None:
    line = json.dumps(StepRecord(1, 1.0, 1.0, "applied", losses={"loss": 0.5}).as_dict()) + "\n"
    grown = {}
    for megabytes in (3, 300):
        path = tmp_path / f"{megabytes}.jsonl"
        block = line.encode() * 10_000
        n_blocks = max(1, megabytes * 1_000_000 // len(block))
        with path.open("wb") as file:
            for _ in range(n_blocks):
                file.write(block)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
        )
        grown[megabytes] = int(done.stdout.split("kB ")[-1])
        os.unlink(path)
    assert grown[300] < grown[3] + 4000  # two blocks of a megabyte, and the overhead of malloc
    assert grown[300] < 30_000


def test_the_name_of_the_run_is_shown_and_its_header_is_no_damage(tmp_path, capsys) -> None:
    with JsonLinesSink(tmp_path / "records.jsonl", name="gpt \x1b[2J", max_bytes=2048) as sink:
        for step in range(1, 31):
            sink(StepRecord(step, 1.0, 1.0, "applied"))
    assert len(rotated_files(sink.path)) > 3  # each begins with a header
    assert main(["monitor", str(sink.path), "--once", "--json", "--last", "7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["damaged_lines"], found["latest"]["step"]) == (7, 0, 30)
    assert found["run"]["name"].startswith("gpt ")
    assert main(["monitor", str(sink.path), "--once"]) == 0
    text = capsys.readouterr().out
    assert "records.jsonl (gpt " in text and "\x1b" not in text and "damaged" not in text


def test_a_file_without_a_header_has_no_run(tmp_path, capsys) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(StepRecord(1, 1.0, 1.0, "applied").as_dict()) + "\n")
    assert main(["monitor", str(path), "--once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] is None


def test_headers_before_the_last_steps_are_not_counted_as_steps(tmp_path) -> None:
    path = tmp_path / "records.jsonl"
    for start in (1, 11, 21):
        with JsonLinesSink(path, name=f"from {start}") as sink:
            for step in range(start, start + 10):
                sink(StepRecord(step, 1.0, 1.0, "applied"))
    state = RunState(5)
    state.catch_up(path.read_bytes().splitlines())
    assert (state.n_records, state.in_window, state.damaged) == (30, 5, 0)
    assert state.header is not None and state.header.name == "from 21"


@pytest.mark.parametrize("last", [1, 3], ids=["of an old line", "of the latest lines"])
@pytest.mark.parametrize(
    "bad", [{"nan": 3}, {"losses": {"a": float("inf")}}, {"total_norm": float("nan")}], ids=str
)
def test_a_step_that_is_applied_with_nan_is_an_incident_as_in_the_report(
    tmp_path, capsys, bad, last
) -> None:
    """`nonfinite="propagate"` records such a step without a reason."""
    path = tmp_path / "records.jsonl"
    with JsonLinesSink(path) as sink:
        sink(replace(StepRecord(1, 1.0, 1.0, "applied", losses={"a": 1.0}, limit=1.0), **bad))
        sink(StepRecord(2, 1.0, 1.0, "applied", losses={"a": 1.0}))
    # The run survived, because a good step followed.
    assert main(["report", str(path), "--out", str(tmp_path)]) == 0
    assert "1 incident in 2 steps" in capsys.readouterr().out
    assert main(["monitor", str(path), "--once", "--last", str(last)]) == int(last == 3)
    state = RunState(last=last)
    state.catch_up(path.read_bytes().splitlines())
    assert (state.n_incidents, state.n_records) == (1, 2)
