"""Which file a command's argument RUN names."""

import pytest

from fastguard import JsonLinesSink, StepRecord
from fastguard.commands.run_files import find_run
from fastguard.commands.usage import UsageError


def write(path, count, **options):
    with JsonLinesSink(path, **options) as sink:
        for step in range(1, count + 1):
            sink(StepRecord(step, 1.0, 1.0, "applied", losses={"loss": 0.5}, lr=0.1))
    return path


def test_a_folder_stands_for_the_run_in_it(tmp_path):
    path = write(tmp_path / "anything.jsonl", 100, max_bytes=2048)
    assert find_run(tmp_path) == path
    other = write(tmp_path / "other.jsonl", 1)
    with pytest.raises(UsageError, match=r"several runs \(anything.jsonl, other.jsonl\)"):
        find_run(tmp_path)
    assert find_run(other) == other
    records = write(tmp_path / "records.jsonl", 1)
    assert find_run(tmp_path) == records


def test_nothing_to_read_is_wrong_use(tmp_path):
    with pytest.raises(UsageError, match=r"holds no \.jsonl file"):
        find_run(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        find_run(tmp_path / "records.jsonl")
