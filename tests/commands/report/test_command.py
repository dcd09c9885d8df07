"""`fastguard report`: output, files and exit status."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

import fastguard
from fastguard import JsonLinesSink, StepRecord
from fastguard.commands.cli import main
from guardtest import require

require("plotly")

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from fastguard.commands.cli import main
sys.exit(main(["report", {run!r}]))
"""


def record(step, **more):
    return StepRecord(step, 1.0, 1.0, "applied", losses={"loss": 1 / step}, lr=0.1, **more)


def bad(step):
    return StepRecord(
        step, 1.0, 1.0, "skipped", reason="nonfinite_loss", losses={"loss": math.nan}, lr=0.1
    )


def written(path, records):
    with JsonLinesSink(path, max_bytes=8192) as sink:
        for one in records:
            sink(one)
    return path


def test_a_page_is_written_next_to_the_records(tmp_path, capsys):
    written(tmp_path / "records.jsonl", [*map(record, range(1, 100)), bad(100), record(101)])
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "1 incident in 101 steps, survived."
    assert printed.out.splitlines()[-1] == f"Written: {tmp_path / 'records.html'}"
    assert printed.err == ""
    page = (tmp_path / "records.html").read_text("utf-8")
    assert "1 incident in 101 steps, survived." in page and "records.jsonl" in page
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # no temporary files


@pytest.mark.parametrize("ranks, text", [((1, 3), "on rank 3"), ((2, None), "on 2 ranks")])
def test_the_culprit_rank_is_shown(tmp_path, ranks, text):
    n, rank = ranks
    struck = dataclasses.replace(bad(50), culprit_ranks=n, culprit_rank=rank)
    written(tmp_path / "records.jsonl", [*map(record, range(1, 50)), struck, record(51)])
    assert main(["report", str(tmp_path)]) == 0
    assert text in (tmp_path / "records.html").read_text("utf-8")


def test_out_selects_another_folder(tmp_path):
    run = written(tmp_path / "run7.jsonl", map(record, range(1, 10)))
    assert main(["report", str(run), "--out", str(tmp_path / "new" / "folder")]) == 0
    assert (tmp_path / "new" / "folder" / "run7.html").exists()
    assert not (tmp_path / "run7.html").exists()


def test_the_status_is_1_if_the_run_ended_in_an_incident(tmp_path, capsys):
    written(tmp_path / "records.jsonl", [*map(record, range(1, 10)), *map(bad, range(10, 60))])
    assert main(["report", str(tmp_path)]) == 1
    assert "was not over when the records ended" in capsys.readouterr().out


def test_damaged_lines_are_counted_and_ignored(tmp_path, capsys):
    path = written(tmp_path / "records.jsonl", map(record, range(1, 10)))
    with path.open("ab") as file:
        file.write(b'\0\0\0\n{"step": 10, "loss": 0.5}\n{"step": 11, "total')
    assert main(["report", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "No incident in 9 steps." in printed
    assert "3 lines could not be read and were left out." in printed


@pytest.mark.parametrize("only_steps", [1, 2, 1500])
def test_records_with_only_required_fields_are_reported(only_steps, tmp_path):
    path = tmp_path / "records.jsonl"
    rest = '"total_norm": 1, "clip_coef": 1, "action": "applied"'
    path.write_text("".join(f'{{"step": {step}, {rest}}}\n' for step in range(only_steps)))
    assert main(["report", str(path)]) == 0
    assert "No incident in" in (tmp_path / "records.html").read_text("utf-8")


def test_a_run_without_records_is_a_usage_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no .jsonl file" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "no.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("garbage\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no fastguard record (the only line is not a record)" in capsys.readouterr().err
    assert not (tmp_path / "empty.html").exists()


def test_an_unwritable_folder_is_reported_before_reading(tmp_path, capsys, monkeypatch):
    written(tmp_path / "records.jsonl", map(record, range(1, 10)))
    reading = "fastguard.commands.report.command.read_blocks"
    monkeypatch.setattr(reading, lambda *args: pytest.fail("it read the file"))
    (tmp_path / "file").write_text("keep me")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write to --out" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["jinja2", "plotly", "rich"])
def test_a_missing_extra_is_named(missing, tmp_path):
    written(tmp_path / "records.jsonl", map(record, range(1, 10)))
    code = WITHOUT.format(name=missing, run=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"fastguard report: No module named '{missing}'; "
        "run: pip install 'torch-fastguard[report]'\n"
    )


def test_the_page_is_reproducible_byte_for_byte(tmp_path):
    run = written(
        tmp_path / "records.jsonl", [*map(record, range(1, 3000)), bad(3000), record(3001)]
    )
    pages = []
    for _ in range(2):
        assert main(["report", str(run)]) == 0
        pages.append((tmp_path / "records.html").read_bytes())
    assert pages[0] == pages[1]


def test_the_json_has_the_header_and_the_times(tmp_path, capsys):
    with JsonLinesSink(tmp_path / "records.jsonl", name="gpt", max_bytes=4096) as sink:
        for step in range(1, 51):
            sink(dataclasses.replace(record(step), time=1.7e9 + step))
    assert main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"]["name"], found["run"]["fastguard"]) == ("gpt", fastguard.__version__)
    assert (found["first_time"], found["last_time"]) == (1.7e9 + 1, 1.7e9 + 50)
    assert (found["starts"], found["records"], found["damaged_lines"]) == (1, 50, 0)


def test_each_process_that_wrote_is_counted_and_the_last_settings_are_shown(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    for limit in (1.5, 2.5):
        p = torch.nn.Parameter(torch.zeros(2))
        opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.1), max_norm=limit)
        sink = opt.add_sink(path)
        p.grad = torch.ones(2)
        opt.step()
        sink.close()
    assert main(["report", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["starts"] == 2 and "max_norm=2.5" in found["run"]["guards"][0]
    page = path.with_suffix(".html").read_text("utf-8")
    assert "started 2 times" in page and "max_norm=2.5" in page and "max_norm=1.5" not in page


def test_records_without_a_header_or_times_are_reported(tmp_path, capsys):
    old = [{k: v for k, v in record(i).as_dict().items() if k != "time"} for i in range(1, 9)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in old))
    assert main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] is None and found["first_time"] is None and found["starts"] == 0
    assert 'id="axis"' not in (tmp_path / "records.html").read_text("utf-8")
