"""The records file for a command's RUN argument, and files of other programs."""

import codecs
import gzip

import pytest

from fastguard import JsonLinesSink, StepRecord
from fastguard.commands.cli import main
from fastguard.commands.run_files import detect_writer, find_run, refuse_foreign_lines
from fastguard.commands.usage import UsageError
from guardtest import require


def write(path, count, **options):
    with JsonLinesSink(path, **options) as sink:
        for step in range(1, count + 1):
            sink(StepRecord(step, 1.0, 1.0, "applied", losses={"loss": 0.5}, lr=0.1))
    return path


def test_a_folder_with_one_run_names_that_run(tmp_path):
    path = write(tmp_path / "anything.jsonl", 100, max_bytes=2048)
    assert find_run(tmp_path) == path
    other = write(tmp_path / "other.jsonl", 1)
    with pytest.raises(UsageError, match=r"several runs \(anything.jsonl, other.jsonl\)"):
        find_run(tmp_path)
    assert find_run(other) == other
    records = write(tmp_path / "records.jsonl", 1)
    assert find_run(tmp_path) == records


def test_a_run_without_records_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"holds no \.jsonl file"):
        find_run(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        find_run(tmp_path / "records.jsonl")


RECORD = '{"step": 3, "total_norm": 1.5, "clip_coef": 1.0, "action": "applied", "new_key": 1}'
FOREIGN = [
    '{"loss": NaN, "step": 1}',
    '{"_step": 3, "_runtime": 12.5, "train/loss": "NaN"}',
    '{"step": 1, "total_norm": 0.5, "clip_coef": 1.0, "loss": 2.0}',
    '{"log_history": []}',
]


@pytest.mark.parametrize("before", [b"", b"\x00" * 64 + b"\n", b'{"step": 2, "total_no\n[1]\n'])
def test_one_record_identifies_fastguard_as_the_writer(before):
    assert detect_writer((before + RECORD.encode()).splitlines()) == "fastguard"
    assert detect_writer([*FOREIGN, RECORD]) == "fastguard"


@pytest.mark.parametrize("line", FOREIGN)
def test_json_lines_of_other_programs_are_recognized(line):
    assert detect_writer([line]) == detect_writer([line.encode()]) == "another program"
    assert detect_writer([codecs.BOM_UTF8 + line.encode()]) == "another program"


@pytest.mark.parametrize(
    "line", ["", "epoch 3 loss nan", "[1]", '{"step": 1', '{"step": 1}', "{" * 100_000, "{}"]
)
def test_the_writer_of_other_lines_is_unknown(line):
    assert detect_writer([line]) == "unknown"


@pytest.mark.parametrize("command", [["report"], ["monitor", "--once"]], ids=lambda c: c[0])
@pytest.mark.parametrize("line", FOREIGN)
def test_json_lines_of_other_programs_are_refused_with_a_hint_to_scan(
    command, line, tmp_path, capsys
):
    path = tmp_path / "my run.jsonl"
    path.write_text(f"{line}\n" * 3)
    assert main([*command, str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"use: fastguard scan '{path}'" in captured.err
    assert not (tmp_path / "my run.html").exists()


def test_after_a_rotation_an_empty_file_is_judged_by_the_previous_one(tmp_path):
    path = write(tmp_path / "records.jsonl", 100, max_bytes=2048)
    path.write_bytes(b"")
    refuse_foreign_lines(path)
    (tmp_path / "records.jsonl").write_text(FOREIGN[0])
    with pytest.raises(UsageError, match="another program"):
        refuse_foreign_lines(path)


@pytest.mark.parametrize("command", [["report"], ["monitor", "--once"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": NaN}\n',
        '{"epoch": 1, "train": {"loss": "nan"}}\n',
        '{"_step": 3, "_runtime": 1.5, "loss": "NaN"}\n',
        '{"log_history": [\n  {"loss": NaN, "step": 1}\n]}\n',
        "epoch 3 step 10 loss nan\n" * 50,
        "step,loss\n1,nan\n",
    ],
    ids=["json", "nested", "w&b", "trainer state", "text", "csv"],
)
def test_logs_of_other_programs_are_refused_with_a_hint_to_scan(command, text, tmp_path, capsys):
    if command == ["report"]:
        require("plotly")
    path = tmp_path / "train log.jsonl"
    path.write_text(text)
    assert main([*command, str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert f"use: fastguard scan '{path}'" in printed.err


@pytest.mark.parametrize("command", [["report"], ["monitor", "--once"]], ids=lambda c: c[0])
def test_folders_named_like_files_are_ignored(command, tmp_path, capsys):
    if command == ["report"]:
        require("plotly")
    for name in ("records.1.jsonl", "other.jsonl"):
        (tmp_path / name).mkdir()
    written = write(tmp_path / "records.jsonl", 100, max_bytes=2048)
    assert written.with_name("records.2.jsonl").is_file()
    assert main([*command, str(tmp_path)]) == 0
    assert "100" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["report"], ["monitor", "--once"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    "before",
    ["\n" * 2000, "epoch 1\n" * 2000, "x" * (300 << 10) + "\n"],
    ids=["blank", "text", "x"],
)
@pytest.mark.parametrize("line", FOREIGN)
def test_json_lines_of_other_programs_late_in_a_file_are_refused(
    command, before, line, tmp_path, capsys
):
    if command == ["report"]:
        require("plotly")
    path = tmp_path / "run.jsonl"
    path.write_text(before + f"{line}\n" * 3)
    assert main([*command, str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and f"use: fastguard scan {path}" in printed.err


def test_lines_of_another_program_among_records_are_pointed_out(tmp_path, capsys):
    path = write(tmp_path / "records.jsonl", 3)
    refuse_foreign_lines(path)
    assert capsys.readouterr().err == ""
    path.write_text(f"{path.read_text()}{FOREIGN[0]}\n")
    refuse_foreign_lines(path)
    assert f"for them use: fastguard scan {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gzip.compress, "is compressed with gzip; unpack it first: gunzip -k"),
        (lambda text: b"[%b]" % text.strip().replace(b"\n", b",\n"), "but not one per line"),
        (lambda text: text.replace(b"{", b"INFO {"), "but not one per line"),
    ],
    ids=["gzip", "list", "prefix"],
)
def test_records_in_another_form_are_not_sent_to_scan(change, message, tmp_path, capsys):
    path = write(tmp_path / "records.jsonl", 30)
    path.write_bytes(change(path.read_bytes()))
    assert main(["monitor", "--once", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_scan_does_not_judge_records_after_a_prefix(tmp_path):
    path = tmp_path / "train.log"
    with JsonLinesSink(path) as sink:
        sink(StepRecord(1, float("nan"), 1.0, "skipped", losses={"loss": float("nan")}, lr=0.1))
    path.write_text(path.read_text().replace("{", "12:00:00 INFO {", 1))
    assert main(["scan", str(path)]) == 0
    path.write_text('12:00:00 INFO {"step": 1, "clip_coef": 1.0, "loss": NaN}\n')
    assert main(["scan", str(path)]) == 1
