"""The steps around an incident are kept one by one, wherever the blocks end."""

import numpy as np
import pytest

from fastguard.commands.report.close_up import REACH, CloseUps
from fastguard.commands.report.columns import NORM, Series

N = 200
STEP = np.arange(1, N + 1)
VALUE = np.random.default_rng(0).normal(size=N)


def cut(about, block):
    close_ups = CloseUps()
    for i in range(0, N, block):
        known = [record for record in about if record < i + block]
        close_ups.add(STEP[i : i + block], {NORM: VALUE[i : i + block]}, known)
    close_ups.finish(about)
    return close_ups.found


@pytest.mark.parametrize("block", [1, 5, REACH, 2 * REACH, 50, N])
def test_blocks_make_no_difference(block):
    about = [0, 1, 17, 18, 49, 50, 51, 100, N - 2, N - 1]
    found = cut(about, block)
    assert sorted(found) == about
    for record, close_up in found.items():
        around = slice(max(0, record - REACH), record + REACH + 1)
        np.testing.assert_array_equal(close_up.step, STEP[around])
        np.testing.assert_array_equal(close_up.values[NORM], VALUE[around])


def test_what_is_no_longer_wanted_is_dropped():
    close_ups = CloseUps()
    close_ups.add(STEP, {NORM: VALUE}, [50, 100])
    close_ups.add(STEP + N, {NORM: VALUE}, [100, N + 50, 2 * N - 1])
    assert sorted(close_ups.found) == [100, N + 50]
    close_ups.finish([N + 50, 2 * N - 1])
    assert sorted(close_ups.found) == [N + 50, 2 * N - 1]


def test_a_new_series_has_no_value_before_it_came():
    loss = Series("loss", "late")
    close_ups = CloseUps()
    close_ups.add(STEP[:50], {NORM: VALUE[:50]}, [49])
    close_ups.add(STEP[50:], {NORM: VALUE[50:], loss: VALUE[50:]}, [49])
    late = close_ups.found[49].values[loss]
    assert np.isnan(late[: REACH + 1]).all() and np.isfinite(late[REACH + 1 :]).all()


def test_no_block_is_kept_alive():
    found = cut([100], 50)
    assert all(column.base is None for column in found[100].values.values())
