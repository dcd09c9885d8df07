"""Untrusted records: output is printable, no value raises an error, memory is bounded."""

from __future__ import annotations

import itertools
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fastguard.commands.cli import main
from fastguard.commands.monitor.run_state import RunState
from fastguard.commands.monitor.sparkline import sparkline
from fastguard.commands.monitor.summary import as_dict, as_text
from fastguard.records.strict_json import dumps
from guardtest import require
from guardtest.odd_records import FIELDS, good

require("rich")
Console = require("rich.console").Console
Screen = require("fastguard.commands.monitor.screen").Screen

TEXTS = {
    "escape code": "\x1b[2J\x9b2J\a",
    "lines": "a\nno incident in the last 9 steps\r\u2028b",
    "override": "\u202egnihton",
    "no width": "\u200b\U000e0041",
    "no utf-8": "\udce9\udcff",
    "markup of rich": "[red]x[/red] [link=https://evil.example/]y[/link]",
}


def rows(text: str) -> list[dict[str, Any]]:
    """A run with this text in every text field of its records."""
    found = []
    for step in range(1, 41):
        row: dict[str, Any] = {"step": step, "total_norm": 1.0, "clip_coef": 1.0, "lr": 0.1}
        row |= {"action": "applied", "losses": {text + str(i): 1.0 for i in range(7)}}
        if step % 5 == 0:
            row |= {"reason": text, "action": text, "spikes": [text], "tag": {text: [text]}}
            row |= {"culprits": [[text, 1, 0, 0]], "n_culprits": 20}
            row |= {"losses": {text: "NaN", text + "b": 1.0}, "thresholds": {text: 1.0}}
        found.append(row)
    return found


def watched(records: list[dict[str, Any]]) -> RunState:
    state = RunState(1000)
    for record in records:
        state.feed(json.dumps(record).encode())
    return state


def screen_of(state: RunState, run: Path) -> str:
    screen = Screen(run, state, rate=1.0, age=1.0)
    console = Console(width=100, height=40, file=None, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(screen)
    return capture.get()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_all_output_is_printable(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / text.replace("/", "_")
    folder.mkdir()
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(text)))
    state = watched(rows(text))
    shown = [screen_of(state, folder)]
    for options in ([], ["--json"]):
        assert main(["monitor", str(folder), "--once", *options]) == 1
        shown.append(capsys.readouterr().out)
    assert main(["monitor", str(folder / f"no {text}"), "--once"]) == 2
    shown.append(capsys.readouterr().err)
    for line in "\n".join(shown).split("\n"):
        assert line.isprintable() and not line.startswith("no incident in the last 9 steps")
    # The JSON output has the original text.
    assert json.loads(shown[2])["incidents"][0]["tag"] == {text: [text]}


ODD = [
    None, True, -1, 3, 2**53, 10**25, 10**400, 1e308, -1e308, 5e-324, 1e999, float("nan"), "", "3",
    "NaN", "-inf", "many", [], [[1]], [["w", 1, 0, 0]], {}, {"a": 1}, {"a": None}, {"a": "NaN"},
    {"a": 1e308, "b": -1e308}, {"a": [1]}, ["a", 3], [["w", "NaN", 0, 0]], [["w", 10**400, 0, 0]],
    "x" * 10_000,
]  # fmt: skip


def assert_is_shown(records: list[dict[str, Any]]) -> None:
    for last in (records, [*records, good(999)]):
        state = watched(last)
        assert state.n_records + state.damaged == len(last)
        for line in (screen_of(state, Path("run")) + as_text(Path("run"), state, 1.0)).split("\n"):
            assert line.isprintable() and len(line) < 6000
        json.loads(dumps(as_dict(Path("run"), state, 1.0)))


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_in_every_field_are_handled(field: str) -> None:
    for odd in ODD:
        assert_is_shown([good(1), good(2), {**good(3), "reason": "x", field: odd}])


@pytest.mark.parametrize("seed", range(20))
def test_odd_values_in_several_fields_are_handled(seed: int) -> None:
    rng = random.Random(seed)
    records = [good(1)]
    for step in range(2, 60):
        row = good(step)
        for field in rng.sample(FIELDS, rng.choice([0, 0, 1, 2, 5])):
            row[field] = rng.choice(ODD)
        for field in rng.sample(sorted(row), rng.choice([0, 0, 0, 1])):
            del row[field]
        records.append(row)
    assert_is_shown(records)


def test_curves_of_extreme_floats_are_scaled() -> None:
    assert sparkline([-1.7e308, 0.0, 1.7e308], 3) == "▁▅█"
    assert sparkline([5e-324, 1.7e308], 2) == "▁█"
    assert sparkline([0.0, 5e-324], 2) in ("▁█", "▁▁")


def test_memory_is_bounded_for_records_of_a_megabyte() -> None:
    def line(step: int) -> bytes:
        row = good(step) | {"action": f"{step}" * 1000, "reason": "r" * 10_000}
        row |= {"tag": [[]] * 50_000, "losses": {f"{step} {i}" * 9: 1.0 for i in range(5_000)}}
        row |= {"spikes": ["s"] * 50_000, "culprits": [["c" * 1000, 1, 0, 0]] * 100}
        return json.dumps(row).encode()

    state = RunState(1000)
    state.feed(line(1))  # warm-up: some objects are allocated only once
    tracemalloc.start()
    for step in range(2, 12):
        state.feed(line(step))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert state.n_records == 11
    assert held < 10 * 100_000  # bytes; the records have 10 MB
    assert max(map(len, as_text(Path("run"), state, 1.0).split("\n"))) < 6000


@pytest.mark.parametrize("name", ["r.jsonl", "r.1.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("command", [["monitor", "--once"], ["report"]], ids=lambda c: c[0])
def test_a_pipe_or_device_among_the_files_is_a_usage_error(
    name: str, kind: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == ["report"]:
        require("plotly")
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(good(1)) + "\n")
    special = tmp_path / name
    special.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(special)
    else:
        special.symlink_to("/dev/zero")
    assert main([*command, str(path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{special} is " in error and "regular file" in error
    assert not list(itertools.chain(tmp_path.glob("*.html"), tmp_path.glob(".*")))
