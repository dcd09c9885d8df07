"""The summary keeps every incident and every extreme, in bounded memory."""

import importlib.util
import json
import math
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fastguard import JsonLinesSink, StepRecord
from fastguard.commands.report.columns import NORM, Series
from fastguard.commands.report.summary import BUCKETS, REACH, Jump, summarize
from fastguard.records.read_json_lines import Block, read_blocks

LOSS = Series("loss", "loss")


@pytest.fixture(scope="module")
def big_run():
    """benchmarks/big_run.py, which is not installed."""
    place = Path(__file__).parents[3] / "benchmarks" / "big_run.py"
    spec = importlib.util.spec_from_file_location("big_run", place)
    module = sys.modules["big_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(step, action="applied", **more):
    more = {"norm": 1.0, "losses": {"loss": 1.0}} | more
    norm = more.pop("norm")
    return StepRecord(step, norm, 1.0, action, **more)


def bad(step, **more):
    return record(step, "skipped", reason="nonfinite_grad", **more)


def blocks_of(records, size=10):
    """Writes the records to a file and reads them as blocks."""
    rows = [json.loads(json.dumps(r.as_dict())) for r in records]
    return [Block(rows[i : i + size], 0, 0) for i in range(0, len(rows), size)]


def summary_of(*records, size=10):
    return summarize(blocks_of(records, size))


@pytest.fixture(scope="module")
def large(big_run, tmp_path_factory):
    """File and summary of 200,000 steps with 300 incidents, in rotated files, 2 lines damaged."""
    path = tmp_path_factory.mktemp("large") / "records.jsonl"
    big_run.write_run(path, 200_000, 300, file_bytes=20_000_000)
    with path.open("ab") as file:
        file.write(b'garbage\n{"step": 200001, "total_no')
    return path, summarize(read_blocks(path))


def test_a_large_run_loses_no_incident(large):
    path, summary = large
    assert path.with_name("records.3.jsonl").exists()
    assert (summary.records, summary.damaged) == (200_000, 2)
    assert (summary.first_step, summary.last_step) == (1, 200_000)
    written = {
        json.loads(line)["step"]
        for file in path.parent.glob("*.jsonl")
        for line in file.read_text().splitlines()
        if '"skipped"' in line
    }
    assert len(written) == summary.table.incidents == summary.actions["skipped"] == 300
    (event,) = summary.events.names
    marks = list(summary.events.items(event))
    assert sum(count for _, count, _ in marks) == 300
    assert {first for _, _, first in marks} <= written
    covered = [step for step in written if (step >> summary.events.shift) in {k for k, *_ in marks}]
    assert len(covered) == 300
    rows = summary.table.rows
    assert len(rows) <= summary.table.limit and sum(row.incidents for row in rows) == 300
    assert sum(summary.layers.total(layer) for layer in summary.layers.names) == 3 * 300


def test_a_large_run_keeps_its_extremes(large):
    path, summary = large
    norms, losses = [], []
    for block in read_blocks(path):
        norms += [row["total_norm"] for row in block.records]
        losses += [float(row["losses"]["loss"]) for row in block.records]
    norms, losses = np.array(norms), np.array(losses)
    for series, values in ((NORM, norms), (LOSS, losses)):
        curve = summary.curves[series]
        highest, lowest = np.nanargmax(values), np.nanargmin(values)
        assert values[highest] in curve.high and highest + 1 in curve.high_at
        assert values[lowest] in curve.low and lowest + 1 in curve.x
        seen = np.isfinite(curve.y)  # bad steps are gaps
        np.testing.assert_array_equal(values[curve.x[seen].astype(int) - 1], curve.y[seen])
        np.testing.assert_array_equal(values[curve.high_at - 1], curve.high)


def test_memory_is_bounded_for_long_runs(big_run, tmp_path):
    def kept(steps, incidents):
        path = tmp_path / f"{steps}.jsonl"
        big_run.write_run(path, steps, incidents)
        summarize([])  # warm-up: some objects are allocated only once
        tracemalloc.start()
        summary = summarize(read_blocks(path, block_bytes=64 << 10))
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(summary.curves[NORM].middle) <= BUCKETS
        return held, peak

    small, large = kept(5_000, 500), kept(20_000, 2_000)
    assert large[0] < 3e6  # memory after the summary
    # Peak memory per step: 49 bytes for its 5 values and 80 bytes while a value is downsampled,
    # together 131 (161 with NumPy 1.26). In the file, a record has 430 bytes; as an object, it is
    # larger.
    assert large[1] - small[1] < 15_000 * 240 and small[1] < 6e6


def test_memory_is_bounded_if_every_step_is_bad():
    records = [
        bad(step, culprits=((f"layer{step % 1000}.w", 1, 0, 0),), n_culprits=1, tag=step)
        for step in range(1, 20_001, 2)
    ]
    summary = summary_of(*records, size=500)
    assert (summary.table.incidents, len(summary.table.rows)) == (1, 1)  # consecutive records
    assert sum(map(summary.layers.total, summary.layers.names)) == 10_000
    assert len(summary.layers.names) <= 257
    assert not summary.survived


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_block_size_does_not_change_the_summary(size):
    random = np.random.default_rng(0)
    records = [
        bad(step) if random.random() < 0.2 else record(step, norm=random.random())
        for step in [*range(1, 300), *range(250, 400), *range(380, 420)]
    ]
    one, other = summary_of(*records, size=7), summary_of(*records, size=size)
    assert one.table.rows == other.table.rows
    assert one.jumps == other.jumps and one.records == other.records
    np.testing.assert_array_equal(one.curves[NORM].high, other.curves[NORM].high)
    np.testing.assert_array_equal(one.curves[NORM].x, other.curves[NORM].x)
    assert one.evidence.kinds == other.evidence.kinds


def test_a_rollback_is_detected():
    summary = summary_of(*map(record, [*range(1, 51), *range(41, 61)]), size=20)
    assert summary.jumps == [Jump(record=50, from_step=50, to_step=41)]
    assert (summary.n_jumps, summary.records, summary.last_step) == (1, 70, 60)


def test_a_rollback_between_bad_steps_separates_two_incidents():
    summary = summary_of(bad(50), bad(51), bad(50), bad(51), record(52))
    assert summary.table.incidents == 2


def test_the_number_of_jumps_is_bounded():
    summary = summary_of(*(record(step) for i in range(2000) for step in (i, i)), size=100)
    assert summary.n_jumps == 2000
    assert len(summary.jumps) == 200


def test_the_mean_excludes_bad_steps():
    summary = summary_of(*(record(s) for s in range(1, 5)), bad(5, norm=100.0), size=5)
    curve = summary.curves[NORM]
    assert np.nanmax(curve.mean) == 1.0 and curve.high.max() == 100.0


@pytest.mark.parametrize("begin", [1, 5, 4000, 4001, 7998, 8000])
def test_steps_around_an_incident_are_drawn_individually(begin):
    norms = np.random.default_rng(0).normal(10, size=8000)
    steps = range(1, 8001)
    summary = summary_of(
        *((bad if s in (begin, begin + 1) else record)(s, norm=norms[s - 1]) for s in steps),
        size=4000,
    )
    near = {s for s in steps if abs(s - begin) <= REACH}
    assert near <= set(summary.curves[NORM].x)
    assert summary.shift == 3 and len(summary.curves[NORM].x) <= 2 * 1001 + len(near)


def test_a_series_may_cover_a_part_of_the_run():
    late = {"losses": {"loss": 1.0, "late": 5.0}}
    records = [record(s, **(late if 40 < s <= 60 else {})) for s in range(1, 101)]
    curve = summary_of(*records, size=10).curves[Series("loss", "late")]
    assert curve.x.tolist() == list(range(41, 61)) and set(curve.y) == {5.0}


@pytest.mark.parametrize("ending, survived", [([record(3)], True), ([], False)])
def test_a_run_survives_if_a_good_step_follows(ending, survived):
    assert summary_of(record(1), bad(2), *ending).survived is survived


def test_records_with_missing_fields_are_read():
    blocks = [Block([{"step": step} for step in range(1, 4)], 1, 0)]
    summary = summarize(blocks)
    assert (summary.records, summary.damaged, summary.table.incidents) == (3, 1, 0)
    assert not summary.curves


def test_an_empty_run_is_summarized():
    summary = summarize([])
    assert (summary.records, summary.survived, summary.table.rows) == (0, True, [])


def test_progress_is_reported_in_bytes(tmp_path):
    path = tmp_path / "run.jsonl"
    with JsonLinesSink(path, max_bytes=4096) as sink:
        for step in range(100):
            sink(record(step, lr=math.pi))
    seen = []
    summary = summarize(read_blocks(path), progress=seen.append)
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert sum(seen) == summary.size == total


def search(step, **more):
    return record(step, "skipped", reason="loss_scale", culprits=(("a.w", 0, 1, 0),), **more)


def test_a_loss_scale_search_is_not_an_incident():
    summary = summary_of(*(search(step) for step in range(1, 18)), record(18), record(19))
    assert (summary.table.incidents, summary.scale_searches) == (0, 17)
    assert summary.actions == {"skipped": 17, "applied": 2}
    assert summary.events.names == [] and summary.layers.names == []


def test_a_loss_scale_search_neither_ends_nor_starts_an_incident():
    def run(*ending):
        return summary_of(record(1), bad(2), search(3), bad(4), search(5), *ending, size=2)

    assert [run().table.incidents, run().table.last.steps, run().survived] == [1, 2, False]
    assert run(record(6)).survived
    back = summary_of(record(1), bad(2), search(2), record(3))  # a rollback between the two
    assert (back.table.incidents, back.table.last.end, back.survived) == (1, 2, True)
