"""Downsampling keeps extremes and means exact."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastguard.commands.report.downsample import downsample, shift_for

LIMIT = 8

steps_lists = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=120)


def curve_of(step, value, limit=LIMIT, good=None, near=None):
    good = np.ones(len(step), bool) if good is None else good
    near = np.zeros(len(step), bool) if near is None else near
    return downsample(step, value, shift=shift_for(step, limit), good=good, near=near)


@given(steps_lists, st.integers(0, 2**32 - 1))
def test_steps_in_any_order_are_downsampled_exactly(steps, seed):
    random = np.random.default_rng(seed)
    steps = np.array(steps)
    values = random.choice([1.0, -2.0, 3.5, np.nan, np.inf, -np.inf, 1e300, 0.0], len(steps))
    good, near = random.random((2, len(steps))) < 0.7
    shift = shift_for(steps, LIMIT)
    curve = curve_of(steps, values, good=good, near=near)
    finite = np.isfinite(values)
    keys = sorted(set((steps[finite] >> shift).tolist()))
    assert len(keys) <= LIMIT
    if not keys:
        assert curve is None
        return
    assert curve.middle.tolist() == [(key << shift) + (2**shift - 1) / 2 for key in keys]
    seen = np.isfinite(curve.y)  # non-finite values are gaps
    assert set(curve.x[~seen]).isdisjoint(steps[finite].tolist())
    drawn = set(zip(curve.x[seen], curve.y[seen], strict=True))
    assert drawn <= set(zip(steps[finite], values[finite], strict=True))
    assert set(zip(steps[finite & near], values[finite & near], strict=True)) <= drawn
    assert np.all(np.diff(curve.x) >= 0)
    for i, key in enumerate(keys):
        here = finite & (steps >> shift == key)
        assert curve.low[i] == values[here].min() and curve.high[i] == values[here].max()
        assert curve.high[i] in values[here & (steps == curve.high_at[i])]
        assert {curve.low[i], curve.high[i]} <= {y for x, y in drawn if int(x) >> shift == key}
        counted = values[here & good]
        expected = counted.mean() if len(counted) else np.nan
        np.testing.assert_allclose(curve.mean[i], expected, rtol=1e-12, atol=1e-12)


def test_buckets_are_as_narrow_as_possible():
    assert shift_for(np.arange(100, 100 + LIMIT), LIMIT) == 0
    assert shift_for(np.arange(100, 101 + LIMIT), LIMIT) == 1


def test_the_bucket_width_does_not_depend_on_the_first_step():
    assert [shift_for(np.arange(1000) + first, 64) for first in (0, 1 << 30)] == [4, 4]


def test_the_middle_of_a_bucket_is_the_mean_of_its_steps():
    assert curve_of(np.arange(8), np.ones(8), limit=2).middle.tolist() == [1.5, 5.5]


def test_the_step_of_the_maximum_is_the_first_one():
    assert curve_of(np.arange(8), np.array([1.0, 3, 3, 2, 3, 0, 0, 0]), limit=1).high_at == [1]


def test_only_bad_steps_without_a_value_are_gaps():
    steps, values = np.arange(1, 9), np.array([1.0, 2, np.nan, 4, np.nan, 6, np.nan, 8])
    good = np.ones(8, bool)
    good[[2, 6]] = False
    curve = curve_of(steps, values, good=good)
    assert curve.x.tolist() == [1, 2, 3, 4, 6, 7, 8]
    assert curve.x[np.isnan(curve.y)].tolist() == [3, 7]


def test_a_long_series_of_bad_steps_is_a_gap():
    steps = np.arange(1, 6401)
    values, good = np.ones(6400), np.ones(6400, bool)
    values[3000:5000], good[3000:5000] = np.nan, False
    curve = curve_of(steps, values, good=good)
    gaps = curve.x[np.isnan(curve.y)]
    assert 1 <= len(gaps) <= LIMIT and np.all((gaps > 3000) & (gaps <= 5000))
