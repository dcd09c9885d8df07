"""However long the run, its extremes, counts and means are exactly those of its steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.commands.report.buckets import Buckets, Tally
from fastguard.commands.report.columns import NORM, Series

LOSS = Series("loss", "seg")
LIMIT = 8

steps_lists = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=120)


def filled(limit, steps, values, good=None, block=7):
    buckets = Buckets(limit)
    good = np.ones(len(steps), bool) if good is None else good
    for i in range(0, len(steps), block):
        part = slice(i, i + block)
        buckets.add(steps[part], {NORM: values[part]}, good[part])
    return buckets


@given(steps_lists, st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_any_order_of_any_steps_is_summed_up_exactly(steps, seed, block):
    random = np.random.default_rng(seed)
    steps = np.array(steps)
    values = random.choice([1.0, -2.0, 3.5, np.nan, np.inf, -np.inf, 1e300, 0.0], len(steps))
    good = random.random(len(steps)) < 0.7
    buckets = filled(LIMIT, steps, values, good, block)
    assert len(buckets.keys) <= LIMIT
    assert buckets.keys.tolist() == sorted(set((steps >> buckets.shift).tolist()))
    curve = buckets.curve(NORM)
    finite = np.isfinite(values)
    keys = [key for key in buckets.keys if np.any(finite & (steps >> buckets.shift == key))]
    if not keys:
        assert curve is None
        return
    for i, key in enumerate(keys):
        here = finite & (steps >> buckets.shift == key)
        assert curve.low[i] == values[here].min() and curve.high[i] == values[here].max()
        for value, at in ((curve.low[i], curve.low_at[i]), (curve.high[i], curve.high_at[i])):
            assert value in values[here & (steps == at)]
        counted = values[here & good]
        expected = counted.mean() if len(counted) else np.nan
        np.testing.assert_allclose(curve.mean[i], expected, rtol=1e-12, atol=1e-12)


def test_no_bucket_is_joined_before_it_must_be():
    steps = np.arange(100, 100 + LIMIT)
    buckets = filled(LIMIT, steps, np.ones(LIMIT))
    assert (buckets.shift, len(buckets.keys)) == (0, LIMIT)
    buckets.add(np.array([100 + LIMIT]), {NORM: np.ones(1)}, np.ones(1, bool))
    assert buckets.shift == 1


def test_a_run_that_begins_late_is_as_fine_as_one_that_begins_at_one():
    early, late = (
        filled(64, np.arange(1000) + first, np.ones(1000)) for first in (0, 1 << 30)
    )  # fmt: skip
    assert early.shift == late.shift == 4


def test_series_may_come_and_go():
    buckets = Buckets(LIMIT)
    good = np.ones(2, bool)
    buckets.add(np.array([1, 2]), {NORM: np.array([1.0, 2.0])}, good)
    buckets.add(np.array([3, 4]), {LOSS: np.array([5.0, 6.0])}, good)
    buckets.add(np.array([5, 6]), {NORM: np.array([3.0, 4.0])}, good)
    buckets.add(np.empty(0, np.int64), {}, np.empty(0, bool))
    assert buckets.series == [NORM, LOSS]
    assert buckets.curve(NORM).low.tolist() == [1, 2, 3, 4]
    assert buckets.curve(LOSS).low_at.tolist() == [3, 4]
    assert buckets.curve(Series("lr")) is None


def test_the_middle_of_a_bucket_is_between_its_steps():
    buckets = filled(2, np.arange(8), np.ones(8))
    assert buckets.curve(NORM).middle.tolist() == [1.5, 5.5]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 10_000)), min_size=1))
def test_a_tally_counts_everything_once(events):
    tally = Tally(LIMIT, names=3)
    for name, step in events:
        tally.add(name, step)
    assert sum(map(tally.total, tally.names)) == len(events)
    known = list(dict.fromkeys(name for name, _ in events))[:3]
    assert tally.names == known + ([Tally.OTHERS] if len(tally.names) > 3 else [])
    for name in tally.names:
        steps = [s for n, s in events if (n if n in known else Tally.OTHERS) == name]
        found = list(tally.items(name))
        assert len(found) <= LIMIT
        for key, count, first in found:
            here = [s for s in steps if s >> tally.shift == key]
            assert (count, first) == (len(here), min(here))


@pytest.mark.parametrize("names", [1, 5])
def test_a_tally_of_few_steps_keeps_each(names):
    tally = Tally(LIMIT)
    for i in range(names * 3):
        tally.add(f"layer {i % names}", i)
    assert tally.shift == 0
