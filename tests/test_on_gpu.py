"""If a stage of benchmarks/on_gpu.sh fails, the others run and the result names it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.sh"
# Replaces the interpreter. Installing fails, and benchmarks write half a result and fail.
PYTHON = """#!/bin/sh
case "$*" in
    *"-m pip"*) exit 1 ;;
    *"-m benchmarks.gpu"*)
        echo "path $PYTHONPATH"
        echo '{"machine": {"card": "A Card 9"}, "commit": "abc"}' > "$5"
        exit ${FAKE_STATUS:-7} ;;
    *"-m pytest"*)
        echo "path $PYTHONPATH"
        echo "soak of ${FASTGUARD_SOAK_SECONDS:-?} s: $*"
        echo "1 failed, 2 passed in 3.00s"
        exit ${FAKE_STATUS:-1} ;;
    *"-m benchmarks.training_step"*)
        echo "path $PYTHONPATH"
        echo '{"rows": [5]}' > "$7"
        exit ${FAKE_STATUS:-1} ;;
    *"-m benchmarks.update"*)
        echo "path $PYTHONPATH"
        echo '{"rows": [6]}' > "$7"
        exit ${FAKE_STATUS:-1} ;;
    *"-m benchmarks.sanitize"* | *nvidia-smi*) exit ${FAKE_STATUS:-3} ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    # A copy of the files that the script reads, because it stages the package in its own folder.
    for folder in ("benchmarks", "fastguard", "kernels"):
        (tmp_path / folder).mkdir()
    script = tmp_path / "benchmarks" / "on_gpu.sh"
    script.write_bytes(SCRIPT.read_bytes())
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("{python}", sys.executable))
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "PYTHONPATH": "/else"}

    def run(*arguments, **more):
        done = subprocess.run(
            ["bash", script, *arguments], env=env | more, capture_output=True, text=True
        )
        return done, tmp_path

    return run


def test_a_failed_stage_does_not_stop_the_others(run):
    done, folder = run()
    assert done.returncode == 1, done.stderr
    (final,) = (folder / "out").glob("*.json")
    assert final.name == "gpu-a-card-9.json"
    document = json.loads(final.read_text())
    assert document["commit"] == "abc"
    assert document["tests"] == "1 failed, 2 passed in 3.00s"
    stages = document["stages"]
    assert list(stages) == (
        ["machine", "install", "benchmarks", "tests", "training", "update", "sanitizer", "soak"]
    )
    assert document["training"] == {"rows": [5]}
    assert document["update"] == [6] and not (folder / "out" / "gpu-update.json").exists()
    assert not (folder / "out" / "gpu-training.json").exists()
    assert stages["benchmarks"].endswith("exit status 7")
    assert stages["tests"].endswith("exit status 1")


def test_if_installing_fails_the_package_is_staged(run):
    """Tests do not see the source folder, whose kernels/ would be importable as a package."""
    done, folder = run()
    stage = folder / "build" / "stage"
    assert (stage / "fastguard" / "kernels").is_dir()
    paths = [line for line in done.stdout.splitlines() if line.startswith("path ")]
    scripts, tests = f"path {stage}:{folder}:/else", f"path {stage}:/else"
    assert paths == [scripts, tests, scripts, scripts, tests]


def test_staging_the_package_is_not_a_failure(run):
    done, folder = run(FAKE_STATUS="0")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((folder / "out" / "gpu-a-card-9.json").read_text())
    assert document["stages"]["install"].startswith("failed")
    assert document["stages"]["tests"].startswith("ok")


def test_stages_share_one_deadline_and_the_soak_takes_the_rest(run):
    """Fake stages take no time, so each limit is the deadline minus the shares of later stages."""
    done, _ = run(FASTGUARD_SECONDS="300")
    limits = dict(re.findall(r"==> (\w+) \(at most (\d+) s\)", done.stdout))
    assert 50 <= int(limits["tests"]) <= 75
    assert 160 <= int(limits["training"]) <= 185
    tests, soak = re.findall(r"soak of (\S+) s: .* -m (\S.*)", done.stdout)
    assert tests[0] == "?" and tests[1].startswith("not slow")
    assert soak == ("120", "slow") and int(limits["soak"]) == 180
    done, _ = run(FASTGUARD_SECONDS="80", FASTGUARD_SOAK_SECONDS="7.5")
    assert "soak of 7.5 s" in done.stdout and "==> tests (at most 20 s)" in done.stdout


def test_a_dry_run_runs_nothing_and_unknown_options_are_refused(run):
    done, folder = run("--dry-run")
    assert done.returncode == 0 and not list((folder / "out").iterdir())
    assert run("--help")[0].returncode == 2
