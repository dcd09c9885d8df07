"""`Tally` counts every event once, in a bounded number of buckets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.commands.report.tally import Tally

LIMIT = 8


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 10_000)), min_size=1))
def test_every_event_is_counted_once(events):
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
def test_few_steps_are_counted_individually(names):
    tally = Tally(LIMIT)
    for i in range(names * 3):
        tally.add(f"layer {i % names}", i)
    assert tally.shift == 0
