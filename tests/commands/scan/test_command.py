"""`fastguard scan`: statuses, the table, the JSON, standard input."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastguard.commands.cli import main

BAD = "epoch 3 batch 15 loss 0.5\nepoch 3 batch 16 loss nan\nepoch 3 batch 17 loss nan\n"
GOOD = "INFO inference of nano banana: loss 0.5\nno nan found\n"


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.log").write_text(BAD)
    (tmp_path / "good.log").write_text(GOOD)
    (tmp_path / "bad.log.gz").write_bytes(gzip.compress(BAD.encode()))
    return tmp_path


def test_findings_give_line_and_place(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "bad.log"]) == 1
    head, heads, row = capsys.readouterr().out.splitlines()
    assert head == "bad.log: NaN or Inf in 2 of 3 lines, first in line 2 (epoch 3, batch 16)"
    assert row.split() == ["2-3", "3", "16-17", "-", "2", "loss", "nan", "plain"]
    assert heads.split()[0] == "line"


def test_good_log_exits_with_0_and_notes_mentions(logs: Path, capsys) -> None:
    assert main(["scan", "good.log"]) == 0
    out = capsys.readouterr().out
    assert "good.log: no NaN or Inf in 2 lines\n" in out
    assert "note: 1 line with NaN or Inf as a word, not as a value; line 2: no nan found" in out


def test_one_bad_log_of_several_gives_exit_status_1(logs: Path, capsys) -> None:
    assert main(["scan", "good.log", "bad.log.gz", "--json"]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["file"], good["bad_lines"], good["mentions"]) == ("good.log", 0, 1)
    assert (bad["file"], bad["lines"], bad["bad_lines"]) == ("bad.log.gz", 3, 2)
    (stretch,) = bad["stretches"]
    assert stretch["first"]["epoch"] == 3 and stretch["first"]["batch"] == 16
    assert stretch["values"] == [{"name": "loss", "value": "nan", "lines": 2}]


def cut_gzip(*more: str) -> bytes:
    good = "".join(f"loss {i}.{i * i}\n" for i in range(3000))
    packed = gzip.compress(("".join(more) + good).encode())
    return packed[: len(packed) // 2]


def test_truncated_gzip_is_read_up_to_its_end(logs: Path, capsys) -> None:
    (logs / "cut.gz").write_bytes(cut_gzip("loss nan\n"))
    assert main(["scan", "cut.gz"]) == 1
    assert "note: not read to its end: the log is truncated gzip data" in capsys.readouterr().out


def test_truncated_gzip_without_nan_gives_exit_status_2(logs: Path, capsys) -> None:
    (logs / "cut.gz").write_bytes(cut_gzip())
    assert main(["scan", "cut.gz"]) == 2
    captured = capsys.readouterr()
    assert "fastguard scan: cut.gz: the log is truncated gzip data" in captured.err
    assert "no NaN or Inf in" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "the log is empty"),
        (b"\n\n", "the log is empty"),
        (lzma.compress(BAD.encode()), "the file is compressed with xz"),
        (bytes(range(256)) * 10, "the log is not text, but binary data"),
    ],
    ids=["empty", "blank", "xz", "binary"],
)
def test_unreadable_log_gives_exit_status_2_and_others_are_scanned(
    logs, data, said, capsys
) -> None:
    (logs / "odd").write_bytes(data)
    assert main(["scan", "odd", "good.log"]) == 2
    captured = capsys.readouterr()
    assert f"fastguard scan: odd: {said}" in captured.err
    assert "good.log: no NaN or Inf in 2 lines" in captured.out
    assert main(["scan", "odd", "bad.log", "--json"]) == 1
    odd, bad = json.loads(capsys.readouterr().out)
    assert said in odd["problem"] and bad["bad_lines"] == 2 and bad["problem"] is None


def test_empty_pipe_gives_exit_status_2(logs: Path) -> None:
    command = [sys.executable, "-m", "fastguard", "scan", "-"]
    done = subprocess.run(command, input="", capture_output=True, text=True)
    assert done.returncode == 2 and "the log is empty" in done.stderr


def test_standard_input(logs: Path) -> None:
    command = [sys.executable, "-m", "fastguard", "scan", "-"]
    done = subprocess.run(command, input=BAD, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("-: NaN or Inf in 2 of 3 lines")


@pytest.mark.parametrize(
    "args, said",
    [
        (["missing.log"], "no such file: missing.log"),
        (["bad.log", "."], ". is a folder"),
        ([], "required: LOG"),
    ],
    ids=str,
)
def test_usage_errors_print_one_line_and_exit_with_2(logs: Path, args, said, capsys) -> None:
    assert main(["scan", *args]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


@pytest.mark.parametrize("kind", ["fifo", "device", "link"])
def test_only_regular_files_are_opened(logs: Path, kind: str, capsys) -> None:
    odd = logs / "odd.log"
    if kind == "fifo":
        os.mkfifo(odd)
    else:
        odd.symlink_to("/dev/zero" if kind == "device" else "/dev/null")
    assert main(["scan", "odd.log"]) == 2
    captured = capsys.readouterr()
    assert "odd.log is not a regular file" in captured.err and captured.out == ""


def test_a_file_of_the_system_is_not_read(logs: Path, capsys) -> None:
    (logs / "odd.log").symlink_to("/proc/self/pagemap")  # regular, without end
    assert main(["scan", "odd.log"]) == 2
    assert "the log is a file of the system" in capsys.readouterr().err


def test_process_substitution_is_read(logs: Path) -> None:
    shell = f"{sys.executable} -m fastguard scan <(cat bad.log) /dev/stdin < good.log"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "NaN or Inf in 2 of 3 lines" in done.stdout
    assert "/dev/stdin: no NaN or Inf in 2 lines" in done.stdout


def test_control_characters_in_file_names_are_escaped(logs: Path, capsys) -> None:
    name = "a\x1b[2J\nok.log"
    (logs / name).write_text(BAD)
    row = {"step": 1, "loss\x1b[2J\nforged: no NaN or Inf in 1 line": math.nan}
    (logs / "b.jsonl").write_text(json.dumps(row) + "\n")
    spikes = [{"step": i, "loss\x1b[2J\nx": 1e9 if i == 20 else 1.0} for i in range(40)]
    (logs / "c.jsonl").write_text("".join(json.dumps(spike) + "\n" for spike in spikes))
    assert main(["scan", name, "b.jsonl", "c.jsonl"]) == 1
    assert main(["scan", "missing\x1b[2J"]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\nforged" not in captured.out and "\nx" not in captured.out
    assert "\nok.log" not in captured.out


def test_damaged_gzip_prints_no_traceback(logs: Path, capsys) -> None:
    packed = bytearray(gzip.compress(BAD.encode()))
    packed[12:20] = b"\x00" * 8
    (logs / "damaged.gz").write_bytes(packed)
    assert main(["scan", "damaged.gz"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_control_sequences_of_a_log_never_reach_the_terminal(logs: Path, capsys) -> None:
    (logs / "evil.log").write_text("epoch 1 loss\x00\x9b2J=nan\ncheck nan\x9b2J\n")
    main(["scan", "evil.log"])
    out = capsys.readouterr().out
    assert "\x9b" not in out and "\x00" not in out


def test_table_of_stretches_is_limited(logs: Path, capsys) -> None:
    (logs / "long.log").write_text("".join(f"epoch {i} loss nan\n" for i in range(60)))
    assert main(["scan", "long.log"]) == 1
    assert "... and 10 more" in capsys.readouterr().out
