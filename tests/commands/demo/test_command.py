"""`fastguard demo`: output, files and exit status."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fastguard.commands.cli import main
from fastguard.commands.demo import command
from fastguard.commands.demo.faults import Kind, plan
from fastguard.commands.demo.picture import draw
from fastguard.commands.demo.report import sentences
from fastguard.commands.demo.training import Bare, Clipped, Guarded, Run
from guardtest import require

require("rich")
require("matplotlib")
STEPS = 20
PNG = b"\x89PNG\r\n\x1a\n"


def only_json(value):
    """For json.loads: NaN and Infinity are not valid JSON."""
    raise AssertionError(f"{value} in a JSON file")


def demo(folder, *options):
    return main(["demo", "--steps", str(STEPS), "--out", str(folder), *options])


def test_the_demo_with_faults(tmp_path, capsys, caplog):
    assert demo(tmp_path / "new" / "folder") == 0
    folder = tmp_path / "new" / "folder"
    printed = capsys.readouterr().out
    assert caplog.records == []  # incidents are in the table, not between the progress bars
    for name in (Bare.name, Clipped.name):
        assert any(
            line.startswith(name) and " nan " in line and "NaN since step" in line
            for line in printed.splitlines()
        )
    assert f"{len(plan(STEPS))} of {STEPS} steps" in printed
    assert "blocks.0.qkv.weight (1 +Inf)" in printed
    assert "head.weight (1 NaN)" in printed
    assert "grad_spike" in printed

    assert sorted(path.name for path in folder.iterdir()) == ["demo.png", "records.jsonl"]
    assert (folder / "demo.png").read_bytes().startswith(PNG)
    lines = (folder / "records.jsonl").read_text("utf-8").splitlines()
    header, *records = [json.loads(line, parse_constant=only_json) for line in lines]
    assert header["name"] == "fastguard demo" and "guarding AdamW" in header["guards"][0]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    skipped = [record["step"] for record in records if record["action"] == "skipped"]
    assert skipped == [fault.step for fault in plan(STEPS)]
    losses = [float(record["losses"]["loss"]) for record in records]
    assert sum(map(math.isnan, losses)) == 2


def test_the_demo_without_faults(tmp_path, capsys):
    assert demo(tmp_path, "--no-faults", "--seed", "3") == 0
    printed = capsys.readouterr().out
    assert "agrees with clip_grad_norm_" in printed
    assert "NaN since" not in printed
    assert not any(kind.value in printed for kind in Kind)
    assert ("injected  " in printed) is ("grad_spike" in printed)  # no table without an incident
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)


WRITTEN = {
    "demo": ({"demo.png", "records.jsonl"}, ["--steps", str(STEPS)]),
    "incident": ({"incident.png", "records.jsonl"}, ["--incident", "B"]),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_a_closed_pipe_does_not_stop_the_demo(what, tmp_path):
    """Runs the demo like `fastguard demo | head -1`; every later write fails."""
    files, options = WRITTEN[what]
    command = [sys.executable, "-u", "-m", "fastguard", "demo", "--out", str(tmp_path), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert files <= {path.name for path in tmp_path.iterdir()}
    assert all((tmp_path / name).stat().st_size for name in files)


def test_the_status_is_1_if_the_guarded_run_is_not_finite(tmp_path, capsys, monkeypatch):
    def destroyed(settings, faults, console, shards):
        return [run(way.name, 1, [math.nan] * STEPS) for way in (Bare, Clipped, Guarded)]

    monkeypatch.setattr(command, "train_all", destroyed)
    assert demo(tmp_path) == 1
    assert "skipped 0 of 20 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--steps", "19"], "19 is not between 20 and"),
        (["--steps", "many"], "'many' is not an integer"),
        (["--steps", "-5"], "-5 is not between 20 and"),
        (["--seed", "-1"], "-1 is not between 0 and"),
        (["--seed", str(2**64)], "is not between 0 and"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_invalid_options_are_usage_errors(options, complaint, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["a file", "below a file", "a null byte", "/proc"])
def test_an_unwritable_folder_is_reported_before_training(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "train_all", lambda *args: pytest.fail("it trained"))
    file = tmp_path / "file"
    file.write_text("keep me")
    out = {
        "a file": str(file),
        "below a file": str(file / "out"),
        "a null byte": "a\0b",
        "/proc": "/proc/fastguard-demo",
    }[place]
    if place == "/proc" and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    assert demo(out) == 2
    error = capsys.readouterr().err
    assert "cannot write to --out" in error and "choose another folder" in error
    assert file.read_text() == "keep me"


# Sentences about runs with other outcomes.


def run(name, destroyed_at=None, losses=(1.0,) * STEPS):
    return Run(name, list(losses), [1.0] * STEPS, validation=1.0, destroyed_at=destroyed_at)


def test_sentences_match_a_run_that_survived():
    bare, clipped, guarded = sentences(
        [run(Bare.name), run(Clipped.name), run(Guarded.name)], plan(STEPS)
    )
    assert "stayed finite" in bare and "stayed finite" in clipped
    assert "skipped 0 of 20 steps, including 0 of the 8 with a fault" in guarded


def test_without_faults_the_sentence_names_the_first_step_that_differs():
    other = (1.0,) * 4 + (1.5,) * (STEPS - 4)
    (sentence,) = sentences(
        [run(Bare.name), run(Clipped.name, losses=other), run(Guarded.name)], ()
    )
    assert "equal before step 5," in sentence
    (sentence,) = sentences([run(Bare.name), run(Clipped.name), run(Guarded.name)], ())
    assert "equal at every step," in sentence


@pytest.mark.parametrize("lost", [1, STEPS])
def test_runs_destroyed_at_any_step_can_be_drawn(lost, tmp_path):
    losses = [math.nan] * STEPS
    runs = [run(way.name, lost, losses) for way in (Bare, Clipped, Guarded)]
    draw(runs, plan(STEPS), 1.0, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
