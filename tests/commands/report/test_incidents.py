"""Consecutive bad steps are one incident; the table is bounded and counts all incidents."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.commands.report.columns import BadStep
from fastguard.commands.report.incidents import IncidentTable


def bad(step, reason="nonfinite_grad", action="skipped"):
    return BadStep(0, step, reason, action, (), 0, (), 1, (), 1.0, None)


def table_of(records, limit=100):
    table = IncidentTable(limit)
    for record in records:
        table.add(record, bad(record + 1))
    return table


def spans(table):
    return [(row.first_step, row.last_step, row.incidents, row.steps) for row in table.rows]


def test_consecutive_bad_steps_are_one_incident():
    table = table_of([3, 4, 5, 9])
    assert spans(table) == [(4, 6, 1, 3), (10, 10, 1, 1)]
    assert (table.incidents, table.steps) == (2, 4)


def test_a_step_number_that_goes_back_begins_a_new_incident():
    table = IncidentTable()
    assert table.add(0, bad(50))
    assert not table.add(1, bad(51))
    assert table.add(2, bad(40), went_back=True)
    assert spans(table) == [(50, 51, 1, 2), (40, 40, 1, 1)]


def test_reasons_and_actions_are_counted():
    table = IncidentTable()
    for i, (reason, action) in enumerate([("a", "x"), ("b", "x"), ("a", "y")]):
        table.add(i, bad(i, reason, action))
    (row,) = table.rows
    assert row.reasons == {"a": 2, "b": 1} and row.actions == {"x": 2, "y": 1}


def test_the_closest_incidents_are_merged_first():
    table = table_of([10, 12, 100, 200, 203, 400], limit=4)
    table.shorten()
    assert spans(table) == [(11, 13, 2, 2), (101, 101, 1, 1), (201, 204, 2, 2), (401, 401, 1, 1)]
    assert table.incidents == 6


@given(st.sets(st.integers(0, 3000), min_size=1), st.integers(1, 12))
def test_merging_loses_no_incident(records, limit):
    records = sorted(records)
    table = table_of(records, limit)
    assert len(table.rows) <= 2 * limit
    table.shorten()
    assert len(table.rows) <= limit
    assert sum(row.steps for row in table.rows) == table.steps == len(records)
    begins = [r for r in records if r - 1 not in records]
    assert sum(row.incidents for row in table.rows) == table.incidents == len(begins)
    assert [row.begin for row in table.rows] == sorted({row.begin for row in table.rows})
    assert {row.begin for row in table.rows} <= set(begins)
    for record in records:
        assert sum(row.first_step <= record + 1 <= row.last_step for row in table.rows) == 1


@pytest.mark.parametrize("after, is_open", [(0, True), (1, False)])
def test_an_incident_is_open_until_a_good_step(after, is_open):
    assert table_of([4, 5]).is_open(6 + after) == is_open
    assert not table_of([]).is_open(after)


def test_the_latest_incident_is_kept_when_merged():
    table = table_of([*range(0, 50, 2), 60, 61, 62], limit=1)
    table.shorten()
    assert spans(table) == [(1, 63, 26, 28)]
    assert (table.last.first_step, table.last.last_step, table.last.steps) == (61, 63, 3)
