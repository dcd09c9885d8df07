"""For each row, benchmarks/watch_cost.py times a step that watches the row's quantity."""

import math

import pytest

from guardtest.bench import benchmarks

watch_cost = benchmarks("watch_cost")


@pytest.mark.parametrize("row", [row for row in watch_cost.ROWS if row != "replica_drift"])
def test_each_row_pairs_a_step_that_watches_its_quantity_with_a_bare_step(row):
    watched, bare, _ = watch_cost.calls_of(row, 3, 8)
    watched(), bare()
    quantity, _ = watch_cost.ROWS[row]
    assert quantity in watched.__self__.records()[0].watch
    assert not bare.__self__.records()[0].watch


@pytest.mark.parametrize("row", watch_cost.ROWS)
def test_every_row_has_a_cost(row):
    assert math.isfinite(watch_cost.cost_of(row, 3, 8, seconds=0.0))
