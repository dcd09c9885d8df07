"""Log lines of incidents are short, and repeats are counted."""

import gc
import logging
import math

import pytest

from fastguard import StepRecord
from fastguard.records.incident_lines import BURST, INTERVAL, IncidentLines

NAN, INF = math.nan, math.inf


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bad(step, action="skipped", reason="nonfinite_grad", **fields):
    return StepRecord(step, 1.0, 1.0, action, reason, **fields)


def good(step):
    return StepRecord(step, 1.0, 1.0, "applied")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(clock):
    return IncidentLines(clock)


def test_repeats_are_counted_and_the_count_is_logged_before_the_next_line(lines, clock, caplog):
    for step in range(1, BURST + 18):
        lines.add(bad(step))
    assert [m.split()[2] for m in caplog.messages] == ["1", "2", "3"]
    clock.now += INTERVAL
    lines.add(bad(100))
    more, last = caplog.messages[BURST:]
    assert more == "fastguard: ... and 17 more skipped because of nonfinite_grad (steps 4 to 20)"
    assert last.startswith("fastguard: step 100 skipped")


def test_an_occasional_incident_is_always_logged(lines, clock, caplog):
    for step in range(1, 100):
        clock.now += INTERVAL
        lines.add(bad(step))
        lines.add(good(step))
    assert len(caplog.messages) == 99


def test_each_kind_has_its_own_limit(lines, caplog):
    for step in range(1, 20):
        lines.add(bad(step))
    lines.add(bad(20, "applied", "loss_spike", losses={"loss": 5.0}, spikes=("loss",)))
    assert caplog.messages[-1].startswith(
        "fastguard: step 20 applied despite loss_spike (rule only records): loss=5 > nan"
    )


def test_the_held_back_count_is_logged_after_a_good_step(lines, clock, caplog):
    for step in range(1, 6):
        lines.add(bad(step))
    lines.add(good(6))
    assert len(caplog.messages) == BURST  # the series may continue
    clock.now += INTERVAL
    lines.add(good(7))
    lines.add(good(8))
    assert len(caplog.messages) == BURST + 1
    assert caplog.messages[-1].endswith(
        "... and 2 more skipped because of nonfinite_grad (steps 4 to 5)"
    )


def test_the_held_back_count_is_logged_at_the_end_of_the_run(clock, caplog):
    lines = IncidentLines(clock)
    for step in range(1, BURST + 2):
        lines.add(bad(step))
    del lines
    gc.collect()
    assert caplog.messages[-1].endswith("... and 1 more skipped because of nonfinite_grad (step 4)")


def test_a_lowered_loss_scale_is_not_a_warning(lines, caplog):
    caplog.set_level(logging.INFO)
    for step in range(1, 9):
        lines.add(bad(step, reason="loss_scale"))
    lines.flush()
    assert {r.levelno for r in caplog.records} == {logging.INFO}
    assert "and 5 more skipped because of loss_scale" in caplog.messages[-1]


def test_a_line_has_at_most_120_characters_with_the_cause_first(lines, caplog):
    culprits = tuple((f"model.layers.{i}.mlp.down_proj.weight", 12, 0, 0) for i in range(8))
    losses = {f"loss_{name}": NAN for name in "abcdefgh"}
    tag = {"epoch": 3, "file": "shard-00012-of-00512.parquet"}
    record = bad(12345, nan=96, culprits=culprits, n_culprits=40, losses=losses, tag=tag)
    lines.add(record)
    (message,) = caplog.messages
    assert len(message) == 120
    assert "model.layers.0.mlp.down_proj.weight (12 NaN) and 39 more" in message
    assert "shard-00012-of-00512.parquet" in str(record) and "layers.7" in str(record)


@pytest.mark.parametrize(
    ("action", "reason", "because"),
    [
        ("skipped", "loss_spike", "because of loss_spike"),
        ("applied", "loss_spike", "despite loss_spike (rule only records)"),
        ("clipped", "loss_spike", "despite loss_spike (rule only records)"),
        ("applied", "grad_spike", "despite grad_spike (rule only records)"),
        ("clipped", "grad_spike", "because of grad_spike"),
        ("sanitized", "nonfinite_grad", "because of nonfinite_grad"),
        ("applied", None, ""),
    ],
)
def test_the_reason_is_phrased_by_action(action, reason, because):
    record = bad(1, action, reason)
    assert record.because == because
    assert because in str(record)


@pytest.mark.parametrize(
    ("counts", "norm"),
    [
        ({}, 1.0),
        ({"posinf": 1}, math.inf),
        ({"neginf": 2}, math.inf),
        ({"nan": 1, "posinf": 1}, NAN),
    ],
)
def test_the_norm_is_the_one_that_torch_gives(counts, norm):
    record = bad(1, **counts)
    assert record.torch_norm == pytest.approx(norm, nan_ok=True)
    assert f"norm {norm:.4g}" in str(record)
