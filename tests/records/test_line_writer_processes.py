"""Only one process at a time writes to a file of records, and the next one continues it."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastguard import GuardedOptimizer, JsonLinesSink, StepRecord, read_records
from fastguard.records.line_writer import LineWriter


def record(step: int, tag: object = None) -> StepRecord:
    return StepRecord(step, 1.0, 1.0, "applied", lr=0.5, tag=tag)


def steps(path: Path) -> list[int]:
    return [r.step for r in read_records(path, strict=True)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


OTHER = """
import sys
from fastguard import JsonLinesSink, StepRecord
sink = JsonLinesSink(sys.argv[1], max_bytes=2000)
sink(StepRecord(1, 1.0, 1.0, "applied"))
print("writing", flush=True)
sys.stdin.read()
"""


class Other:
    """Another process that writes to the file until it is stopped or killed."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None and self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_second_process_gets_an_error_with_the_pid_until_the_first_ends(path: Path) -> None:
    other = Other(path)
    with pytest.raises(BlockingIOError, match=f"open for writing in process {other.process.pid}"):
        JsonLinesSink(path)
    other.kill()
    with JsonLinesSink(path) as sink:  # the next run continues the file
        sink(record(2))
    assert steps(path) == [1, 2]


def test_an_unclosed_sink_does_not_block_others(path: Path) -> None:
    """This happens in a notebook if a cell is run again."""
    for step in (1, 2, 3):
        sink = JsonLinesSink(path)
        sink(record(step))
    sink.cycle = sink
    del sink
    gc.collect()
    assert not LineWriter._all
    Other(path).kill()  # the lock is free
    assert steps(path) == [1, 2, 3, 1]


def test_a_forked_child_counts_its_lost_records(path: Path) -> None:
    sink = JsonLinesSink(path)
    sink(record(1))
    answers = multiprocessing.get_context("fork").Queue()

    def child() -> None:
        sink(record(-1))
        sink.close()
        answers.put((sink.lost, len(LineWriter._all)))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert answers.get(timeout=60)[0] == 1
    process.join()
    sink(record(2))
    sink.close()
    assert steps(path) == [1, 2] and sink.lost == 0


def test_a_child_can_write_once_its_parent_has_closed_the_file(path: Path) -> None:
    """A program that becomes a daemon does so."""
    read, write = os.pipe()
    sink = JsonLinesSink(path)
    sink(record(1))
    pid = os.fork()
    if pid == 0:
        try:
            os.read(read, 1)
            os.closerange(3, 200)  # a daemon first closes its descriptors
            sink(record(2))
            sink.close()
        finally:
            os._exit(0 if sink.lost == 0 else 1)
    sink.close()
    os.write(write, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(read), os.close(write)
    assert steps(path) == [1, 2]


def test_workers_of_a_data_loader_keep_no_file_locked(path: Path) -> None:
    opt = GuardedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    sink = JsonLinesSink(path)
    opt.add_sink(sink)
    data = [(torch.zeros(1), opt)] * 4  # each worker holds the optimizer, and so the sink
    loader = torch.utils.data.DataLoader(
        data,  # type: ignore[arg-type]
        num_workers=2,
        multiprocessing_context="fork",
        persistent_workers=True,
        collate_fn=lambda batch: batch[0][0],
    )
    for _ in loader:
        opt.step()
    sink.close()
    Other(path).kill()  # the workers are still running
    assert len(steps(path)) == 5


@pytest.mark.parametrize("how", ["pickle", "copy", "deepcopy"])
def test_a_copy_writes_through_the_same_file(path: Path, how: str) -> None:
    sink = JsonLinesSink(path, max_bytes=2048, keep=7)
    copies = {"copy": copy.copy, "deepcopy": copy.deepcopy}
    twin = copies.get(how, lambda s: pickle.loads(pickle.dumps(s)))(sink)
    assert (twin.path, twin.max_bytes, twin.keep) == (path, 2048, 7)
    for step in range(1, 40, 2):
        sink(record(step))
        twin(record(step + 1))
    sink.close()
    twin(record(41))
    twin.close()
    assert steps(path)[-1] == 41 and sink.lost == twin.lost == 0


SPAWNED = """
import pickle, sys
from fastguard import StepRecord
sink = pickle.loads(sys.stdin.buffer.read())
files = [open("weights", "wb", buffering=0) for _ in range(8)]   # get the numbers that are free
sink(StepRecord(2, 1.0, 1.0, "applied"))
print(sink.lost, max(file.tell() for file in files))
"""


def test_a_copy_in_a_spawned_process_writes_to_the_right_file(path: Path, tmp_path: Path) -> None:
    sink = JsonLinesSink(path)
    sink(record(1))
    for is_closed in (False, True):
        if is_closed:
            sink.close()
        done = subprocess.run(
            [sys.executable, "-c", SPAWNED],
            input=pickle.dumps(sink),
            capture_output=True,
            cwd=tmp_path,
            check=True,
        )
        assert done.stdout.split() == ([b"0", b"0"] if is_closed else [b"1", b"0"])
    assert steps(path) == [1, 2]


def test_a_link_to_a_file_of_records_is_the_same_file_to_another_process(path: Path) -> None:
    link = path.with_name("latest.jsonl")
    path.write_text("")
    link.symlink_to(path)
    other = Other(path)
    with pytest.raises(BlockingIOError):
        JsonLinesSink(link)
    other.kill()


ROTATES = """
import itertools, sys
from fastguard import JsonLinesSink, StepRecord
with JsonLinesSink(sys.argv[1], max_bytes=1500) as sink:   # one rotation in three records
    print("writing", flush=True)
    for step in range(1, 1501):
        sink(StepRecord(step, 1.0, 1.0, "applied"))
    assert sink.lost == 0, sink.lost
"""


def test_no_other_process_can_take_over_during_a_rotation(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ROTATES, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()
    outcomes: Counter[str] = Counter()
    while process.poll() is None:
        try:
            JsonLinesSink(path).close()
            outcomes["got in"] += process.poll() is None and len(steps(path)) < 1500
        except BlockingIOError:
            outcomes["refused"] += 1
    process.communicate()
    assert process.returncode == 0
    assert steps(path) == list(range(1, 1501))
    assert outcomes["refused"] and not outcomes["got in"]
