"""Incidents from before the tail are found by searching backwards, in slices."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastguard import JsonLinesSink, StepRecord
from fastguard.commands.monitor.follow import Follower
from fastguard.commands.monitor.history import History
from fastguard.records.rotated_files import rotated_files

N = 600
BAD = [3, 77, 300, 301, 302, 555]


@pytest.fixture(params=[1 << 30, 3000], ids=["one-file", "rotated"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with JsonLinesSink(tmp_path / "r.jsonl", max_bytes=request.param) as sink:
        for step in range(1, N + 1):
            searches = step % 50 == 0 and step not in BAD  # for a loss scale: no incident
            reason = "loss_spike" if step in BAD else "loss_scale" if searches else None
            tag = {"reason": "none of it"} if step % 7 == 0 else None  # looks like one, and is not
            sink(StepRecord(step, 1.0, 1.0, "skipped" if reason else "applied", reason, tag=tag))
    return sink.path


@pytest.mark.parametrize("last", [1, 100, 300, N, 2 * N])
def test_tail_and_history_together_are_the_whole_run_once(path: Path, last: int) -> None:
    follower = Follower(path, last)
    history = History(follower.earlier, keep=100)
    history.search(60.0)
    assert history.done
    assert [r.step for r in history.incidents] == [s for s in reversed(BAD) if s <= N - last]
    assert history.n_incidents == len(history.incidents)
    assert history.n_steps + len(list(follower.poll())) == N


def test_a_slice_of_no_time_reads_one_block_and_the_rest_comes_later(path: Path) -> None:
    follower = Follower(path, last=1)
    history = History(follower.earlier, keep=2)
    history.search(0.0)
    assert not history.done and history.n_steps > 0
    while not history.done:
        history.search(0.0)
    assert history.n_incidents == len(BAD)
    assert [r.step for r in history.incidents] == [555, 302]  # the latest are kept


def test_rotated_meanwhile_it_is_found_under_its_new_name(path: Path) -> None:
    follower = Follower(path, last=1)
    number = len(rotated_files(path)) + 1
    path.rename(path.with_name(f"r.{number}.jsonl"))
    history = History(follower.earlier, keep=10)
    history.search(60.0)
    assert (history.n_steps, history.n_incidents) == (N - 1, len(BAD))


def test_deleted_meanwhile_it_is_passed_over(path: Path) -> None:
    follower = Follower(path, last=1)
    for file in [path, *rotated_files(path)]:
        file.unlink()
    history = History(follower.earlier, keep=10)
    history.search(60.0)
    assert history.done and history.n_steps == 0


def test_before_there_is_a_file_there_is_no_history(tmp_path: Path) -> None:
    history = History(Follower(tmp_path / "r.jsonl", last=1).earlier, keep=10)
    history.search(0.0)
    assert history.done


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"reason": "x"\n\xff\x00"reason": "y"\n' + b"z" * 3_000_000 + b"\n{}\n")
    history = History(Follower(path, last=1).earlier, keep=10)
    history.search(60.0)
    assert (history.n_incidents, history.n_steps, history.done) == (0, 3, True)
