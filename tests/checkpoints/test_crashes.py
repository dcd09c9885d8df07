"""`kill -9` at any moment leaves a store that opens and whose last clean checkpoint loads."""

import random
import re
from pathlib import Path

from guardtest.programs import run_program

SCRIPT = Path(__file__).with_name("crash_run.py")


def run(*arguments):
    done = run_program(SCRIPT.read_text(), *arguments, timeout=200)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return done.stdout


def test_kill_at_twenty_random_moments(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    assert "20 kills" in run("random", tmp_path, seed)


def test_kill_before_every_operation_on_the_disk(tmp_path):
    moments = re.match(r"(\d+) moments", run("exhaustive", tmp_path))
    assert int(moments[1]) > 30


def test_kill_at_every_moment_of_rolling_back_a_foreign_file(tmp_path):
    moments = re.match(r"(\d+) moments", run("file", tmp_path))
    assert int(moments[1]) >= 5
