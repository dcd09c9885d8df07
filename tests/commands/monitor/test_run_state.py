"""The state of a run that the screen and the summary show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard import StepRecord
from fastguard.commands.monitor.run_state import CURVE, INCIDENTS, RATE_SECONDS, Rate, RunState
from fastguard.commands.monitor.sparkline import ASCII_BARS, sparkline
from fastguard.commands.monitor.summary import as_dict, as_text, duration, verdict

ACTIONS = ["applied", "clipped", "sanitized", "skipped"]


def line(step: int, action: str = "applied", **fields: object) -> bytes:
    if action == "skipped":
        fields.setdefault("reason", "nonfinite_grad")
        fields.setdefault("consecutive_skips", 1)
    return json.dumps(StepRecord(step, 1.0, 1.0, action, **fields).as_dict()).encode()  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(ACTIONS)), st.integers(1, 10))
def test_counts_cover_the_last_records(actions: list[str], last: int) -> None:
    state = RunState(last)
    for step, action in enumerate(actions):
        state.feed(line(step, action))
    latest = actions[-last:]
    assert dict(state.actions) == {a: latest.count(a) for a in ACTIONS if a in latest}
    assert state.incidents_in_window == latest.count("skipped")
    assert state.n_incidents == actions.count("skipped")
    assert state.in_window == len(latest) and state.n_records == len(actions)


def test_damaged_lines_are_counted_and_blank_lines_ignored() -> None:
    state = RunState(10)
    for damaged in (b"{", b"[1]", b'{"step": 1}', b"\xff\xfe", b"\x00" * 100):
        state.feed(damaged)
    for blank in (b"", b"  ", b"\r"):
        state.feed(blank)
    state.feed(line(1))
    assert (state.damaged, state.n_records) == (5, 1)


def test_memory_is_bounded() -> None:
    state = RunState(last=1_000_000)
    for step in range(5000):
        state.feed(line(step, "skipped"))
    assert len(state.curve) == CURVE and len(state.incidents) == INCIDENTS
    assert state.incidents_in_window == 5000


def test_the_verdict_is_one_sentence() -> None:
    state = RunState(3)
    assert verdict(state) == "no records yet"
    state.feed(line(1))
    assert verdict(state) == "no incident in the last 1 step"
    state.feed(line(2, "skipped"))
    state.feed(line(3, "skipped", consecutive_skips=2))
    assert verdict(state) == "2 incidents in the last 3 steps, skipping now (2 in a row)"
    state.feed(line(4))
    assert verdict(state) == "2 incidents in the last 3 steps, the latest at step 3"
    state.feed(line(5))
    state.feed(line(6))
    assert verdict(state) == "no incident in the last 3 steps"


def test_text_in_records_cannot_control_the_terminal(tmp_path) -> None:
    state = RunState(3)
    state.feed(line(1, "skipped\x1b[2J", reason="\x1b]0;x\x07", losses={"\x1b[1m": 1.0}, tag="\n"))
    text = as_text(tmp_path, state, 1.0)
    assert "\x1b" not in text and "\x07" not in text


def test_the_rate_covers_the_last_seconds() -> None:
    rate = Rate()
    # Lines that were written before the monitor started are not counted.
    assert rate.sample(100.0, 1000) is None
    assert rate.sample(100.5, 1100) is None  # the interval is too short for a rate
    assert rate.sample(102.0, 1020) == 10.0
    for second in range(3, 1000):
        latest = rate.sample(100.0 + second, 1020 + 5 * (second - 2))
    assert latest == 5.0
    assert len(rate._samples) <= RATE_SECONDS + 2


def test_sparklines() -> None:
    assert sparkline([0, 7], 80) == "▁█"
    assert sparkline([5, 5, 5], 80) == "▁▁▁"
    assert sparkline([math.nan, 1, 2, math.inf], 80) == "!▁█!"
    assert sparkline([1, 10, 100, 1000, 10_000], 80, "01234") == "01234"  # logarithmic
    assert sparkline([-1e300, 1e300], 80, ASCII_BARS)[0] == "_"
    assert sparkline([], 80) == "" and sparkline([1.0], 0) == ""
    spike = [1.0] * 10_000
    spike[1234] = 50.0
    assert sparkline(spike, 100).count("█") == 1  # no peak is lost to a narrow terminal


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3700, 90_000)] == [
        "0 s",
        "1 min 1 s",
        "1 h 1 min",
        "1 d 1 h",
    ]


def test_a_loss_scale_search_is_not_an_incident() -> None:
    state = RunState(10)
    state.feed(line(1, "skipped", reason="loss_scale", consecutive_skips=0))
    assert (state.n_incidents, state.incidents_in_window) == (0, 0)
    assert verdict(state) == "no incident in the last 1 step"
    state.feed(line(2, "skipped", reason=None))  # a record that was written without its reason
    assert (state.n_incidents, state.incidents_in_window) == (1, 1)
    assert state.actions == {"skipped": 2}


BAD = [3, 77, 300, 301, 302, 555]


@pytest.mark.parametrize("last", [1, 100, 300, 600, 1200])
def test_incidents_before_the_window_are_counted(last: int) -> None:
    lines = []
    for step in range(1, 601):
        # A search for the loss scale is not an incident.
        searches = step % 50 == 0 and step not in BAD
        reason = "loss_spike" if step in BAD else "loss_scale" if searches else None
        # Contains the key of a reason, but is a tag.
        tag = {"reason": "none of it"} if step % 7 == 0 else None
        action = "skipped" if reason else "applied"
        lines.append(line(step, action, reason=reason, tag=tag, lr=0.1))
    whole, quick = RunState(last), RunState(last)
    for one in lines:
        whole.feed(one)
    quick.catch_up(lines)
    assert (quick.n_records, quick.n_incidents) == (600, len(BAD))
    assert list(quick.incidents) == list(whole.incidents)
    assert (quick.actions, quick.reasons) == (whole.actions, whole.reasons)
    assert (quick.latest, quick.curve) == (whole.latest, whole.curve)


def test_damaged_lines_before_the_window_are_ignored() -> None:
    state = RunState(1)
    state.catch_up([b'{"reason": "x"', b'\xff\x00"reason": "y"', b"z" * 3_000_000, line(4)])
    assert (state.n_incidents, state.n_records, state.damaged) == (0, 4, 0)


def test_the_layers_with_the_largest_gradients_are_shown() -> None:
    state = RunState(10)
    norms = {"blocks.0.w": 3.0, "blocks.0.b": 4.0, "head.w": 12.0, "a\nb.w": 1.0, "c.w": 0.5}
    state.feed(line(1, watch={"tensor_norms": norms}))
    state.feed(line(2))
    text = as_text(Path("run"), state, None)
    assert "largest gradient norms at step 1: head 12, blocks.0 5, a\\nb 1" in text
    assert as_dict(Path("run"), state, None)["layers"] == {
        "step": 1,
        "norms": {"head": 12.0, "blocks.0": 5.0, "a\nb": 1.0},
    }


def test_watched_statistics_are_not_kept() -> None:
    state = RunState(10)
    norms = {f"layer{i}.w": 1.0 for i in range(5000)}
    drift = {"replica_drift": {"weights": [2], "gradients": 5}}
    state.feed(line(1, "skipped", watch={"tensor_norms": norms} | drift))
    assert state.curve[0].watch == drift
    assert "the weights of rank 2 differ" in as_text(Path("run"), state, None)
