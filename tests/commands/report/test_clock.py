"""The time axis of a report: the time of each step."""

import numpy as np
import pytest

from fastguard.commands.report.clock import clock_of


def clock(pairs, shift=0, near=()):
    step = np.array([s for s, _ in pairs], dtype=np.int64)
    time = np.array([t for _, t in pairs], dtype=np.float64)
    return clock_of(step, time, shift=shift, near=np.isin(step, near))


def test_seconds_count_from_the_first_step():
    found = clock([(1, 1000.0), (2, 1000.5), (3, 1002.0)])
    assert (found.start, found.end) == (1000.0, 1002.0)
    assert found.as_dict() == {"start": 1000.0, "steps": [1, 2, 3], "seconds": [0.0, 0.5, 2.0]}


def test_a_repeated_step_has_the_time_of_its_last_repetition():
    found = clock([(1, 10.0), (2, 11.0), (3, 12.0), (2, 20.0), (3, 21.0), (4, 22.0)])
    assert found.steps.tolist() == [1, 2, 3, 4]
    assert found.seconds.tolist() == [0.0, 10.0, 11.0, 12.0]


def test_times_never_decrease():
    assert clock([(1, 10.0), (2, 15.0), (3, 12.0), (4, 16.0)]).seconds.tolist() == [0, 5, 5, 6]
    ended_below = clock([(1, 10.0), (2, 11.0), (3, 12.0), (2, 20.0)])
    assert ended_below.seconds.tolist() == [0.0, 10.0, 10.0]


def test_a_bucket_keeps_its_first_and_last_step_and_those_near_an_incident():
    pairs = [(step, 100.0 + step) for step in range(1, 33)]
    found = clock(pairs, shift=3, near=(11, 12))
    assert found.steps.tolist() == [1, 7, 8, 11, 12, 15, 16, 23, 24, 31, 32]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -5.0, 0.0, 1e300])
def test_invalid_times_are_ignored(bad):
    assert clock([(1, 10.0), (2, bad), (3, 12.0)]).steps.tolist() == [1, 3]
    assert clock([(1, bad), (2, bad)]) is None
    assert clock([(1, 10.0), (2, bad)]) is None
    assert clock([]) is None
