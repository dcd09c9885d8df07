"""A lasting rise and its beginning are found; noise, transients and plateaus are not reported."""

import numpy as np
import pytest

from fastguard.commands.report.trend import find_rise

N, SINCE = 12_000, 9_400
STEP = np.arange(N, dtype=float)
RISE = 1 + np.maximum(0, STEP - SINCE) / 1300  # to three times


def noise(seed):
    return np.exp(np.random.default_rng(seed).normal(0, 0.3, N))


def averaged(curve, width=12):
    return STEP.reshape(-1, width).mean(1), curve.reshape(-1, width).mean(1)


SHAPES = {
    "flat": np.ones(N),
    "falling": 0.3 + np.exp(-STEP / 2000),
    "warm-up, then flat": 1 - np.exp(-(STEP + 1) / 300),
    "a step up": 1 + 2 * (STEP > 3000),
    "a ramp that has ended": 1 + np.clip((STEP - 3000) / 2000, 0, 2),
    "a bump": 1 + 3 * np.exp(-(((STEP - 9000) / 500) ** 2)),
    "one late spike": 1 + 50 * (STEP == N - 200),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_series_without_a_lasting_rise_are_not_reported(shape):
    for seed in range(20):
        assert find_rise(*averaged(shape * noise(seed))) is None


@pytest.mark.parametrize("before", [1.0, 1 + 3 * np.exp(-STEP / 800)], ids=["flat", "falling"])
def test_the_beginning_of_a_rise_is_found(before):
    for seed in range(20):
        rise = find_rise(*averaged(before * RISE * noise(seed)))
        assert abs(rise.since - SINCE) < 400
        assert rise.before == pytest.approx(1.05, rel=0.1)
        assert rise.now == pytest.approx(3.15, rel=0.15)


def test_a_rise_of_non_positive_values_is_found():
    line = -1 + 0.05 * np.log(noise(0)) + 2 * (RISE - 1)
    rise = find_rise(*averaged(line))
    assert abs(rise.since - SINCE) < 200
    assert rise.before == pytest.approx(-1, abs=0.1) and rise.now == pytest.approx(3, abs=0.2)


def test_a_rise_must_reach_the_factor():
    step, value = averaged(1 + 0.2 * (RISE - 1))
    assert find_rise(step, value, factor=1.5) is None
    assert find_rise(step, value, factor=1.1) is not None


def test_the_step_has_no_more_digits_than_are_known():
    step, value = averaged(RISE * noise(0))
    assert find_rise(step, value).since % 10 == 0
    assert find_rise(step * 1000, value).since % 10_000 == 0


@pytest.mark.parametrize("n", [0, 1, 5, 15])
def test_a_few_values_are_no_trend(n):
    assert find_rise(np.arange(n, dtype=float), np.arange(1.0, n + 1)) is None


def test_nonfinite_values_are_ignored():
    step, value = averaged(RISE * noise(0))
    value[::7] = np.nan
    value[3::50] = np.inf
    assert abs(find_rise(step, value).since - SINCE) < 400
    assert find_rise(step, np.full_like(step, np.nan)) is None
