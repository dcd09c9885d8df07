"""Each diff of docs/tutorial.md applies, and each run prints the output on the page."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastguard
from fastguard.commands.cli import main
from fastguard.commands.demo.training import one_thread

DOCS = Path(__file__).resolve().parents[1] / "docs"
PARTS = re.findall(
    r"^```(python|diff|text|records|report)\n(.*?)^```",
    (DOCS / "tutorial.md").read_text(),
    re.S | re.M,
)


def applied(diff: str, script: str) -> str:
    """Returns the script after all hunks of the diff. Each hunk must match exactly one position."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        assert script.count(before) == 1, before
        script = script.replace(before, after)
    return script


def without_digits(text: str) -> str:
    """Hides decimals: the last digits of a loss differ between CPUs and versions of torch."""
    return re.sub(r"\d+\.\d+", "#", text)


def agrees(line: str, shown: str) -> bool:
    """Whether a line begins with the text on the page, up to the dots."""
    return without_digits(line).startswith(without_digits(shown.removesuffix("...").rstrip()))


def check(kind: str, shown: str, printed: str, records: list[fastguard.StepRecord]) -> None:
    if kind == "text":
        assert without_digits(printed) == without_digits(shown)
    elif kind == "records":
        lines: Iterator[str] = (str(record) for record in records if record.is_incident)
        for wanted in shown.splitlines():
            assert any(agrees(line, wanted) for line in lines), wanted
    else:
        for line, wanted in zip(printed.splitlines(), shown.splitlines(), strict=False):
            assert agrees(line, wanted), (line, wanted)


@pytest.mark.slow
def test_the_tutorial(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    script, printed, records = "", "", []
    n_outputs = 0
    for kind, block in PARTS:
        if kind in ("python", "diff"):
            script = block if kind == "python" else applied(block, script)
            Path("train.py").write_text(script)
            capsys.readouterr()
            Path("run/records.jsonl").unlink(missing_ok=True)
            with one_thread():
                ran = runpy.run_path("train.py", run_name="__main__")
            printed = capsys.readouterr().out
            history = getattr(ran["optimizer"], "history", ())
            records = list(history)
            del ran
        else:
            if kind == "report":
                assert main(["report", "run"]) == 0
                printed = capsys.readouterr().out
            check(kind, block, printed, records)
            n_outputs += 1
    assert n_outputs >= 9
    example = (DOCS / "examples/train_gpt.py").read_text()
    assert example.partition('"""\n\n')[2] == script
