"""Records are converted to columns, even if fields are missing or have the wrong type."""

import math

import numpy as np
import pytest

from fastguard import StepRecord
from fastguard.commands.report.columns import (
    COEF,
    LIMIT,
    LR,
    MAX_NAMES,
    NORM,
    TIME,
    UNITS,
    ColumnReader,
    Series,
)

NAN, INF = math.nan, math.inf


def as_read(step=1, norm=1.0, coef=1.0, action="applied", **more):
    return StepRecord(step, norm, coef, action, **more).as_dict()


def read(*records):
    return ColumnReader().read(list(records))


def test_fields_become_columns():
    columns = read(
        as_read(1, 2.0, lr=0.1, losses={"a": 1.0}, thresholds={"grad_norm": 5.0}, time=1.7e9),
        as_read(2, norm=3.0, coef=0.5, action="clipped", losses={"a": 2.0, "b": -1.0}),
    )
    assert columns.step.tolist() == [1, 2]
    found = {series: column.tolist() for series, column in columns.values.items()}
    np.testing.assert_equal(
        found,
        {
            NORM: [2.0, 3.0],
            COEF: [1.0, 0.5],
            LR: [0.1, NAN],
            LIMIT: [math.inf, math.inf],
            TIME: [1.7e9, NAN],
            Series("loss", "a"): [1.0, 2.0],
            Series("loss", "b"): [NAN, -1.0],
            Series("threshold", "grad_norm"): [5.0, NAN],
        },
    )
    assert columns.actions == {"applied": 1, "clipped": 1}
    assert (columns.bad, columns.rejected) == ([], 0)


def test_the_share_of_clipped_units_is_a_column_if_there_are_any():
    columns = read(
        as_read(1, clipped_units=3, limited_units=12),
        as_read(2, action="skipped"),
        as_read(3, limited_units=12),
        {"step": 4},
    )
    np.testing.assert_equal(columns.values[UNITS], [0.25, NAN, 0.0, NAN])
    assert UNITS not in read(as_read()).values
    rejected = read(as_read(), {**as_read(2), "limited_units": 3, "clipped_units": "x"})
    assert rejected.step.tolist() == [1] and rejected.rejected == 1


def test_a_record_with_only_a_step_is_valid():
    columns = read({"step": 7}, as_read(8))
    assert columns.step.tolist() == [7, 8]
    assert math.isnan(columns.values[NORM][0])
    assert (columns.bad, columns.rejected) == ([], 0)


@pytest.mark.parametrize(
    "record, reason",
    [
        (as_read(action="skipped", reason="grad_spike", spikes=("grad_norm",)), "grad_spike"),
        (as_read(losses={"a": INF}), "nonfinite_loss"),
        (as_read(losses={"a": -INF, "b": 1.0}), "nonfinite_loss"),
        (as_read(losses={"a": NAN}, culprits=(("w", 1, 0, 0),), n_culprits=1), "nonfinite_grad"),
        (as_read(action="sanitized", culprits=(("w", 0, 1, 0),), n_culprits=1), "nonfinite_grad"),
        (as_read(norm=INF), "nonfinite_grad"),
        (as_read(norm=NAN), "nonfinite_grad"),
    ],
)
def test_the_reason_of_a_bad_step_is_inferred_if_missing(record, reason):
    (bad,) = read(as_read(1), {**record, "step": 2}, as_read(3)).bad
    assert (bad.row, bad.step, bad.reason) == (1, 2, reason)
    assert bad.action == record["action"]


def test_a_bad_step_keeps_its_details():
    record = as_read(
        4,
        norm=9.0,
        action="skipped",
        reason="nonfinite_grad",
        culprits=(("head", 2, 1, 0),),
        n_culprits=12,
        losses={"a": NAN, "b": 1.0},
        tag=(3, 46),
    )
    (bad,) = read(record).bad
    assert bad.culprits == (("head", 2, 1, 0),)
    assert (bad.n_culprits, bad.bad_losses, bad.n_losses) == (12, ("a",), 2)
    assert (bad.norm, bad.tag) == (9.0, [3, 46])


@pytest.mark.parametrize(
    "wrong",
    [
        {"total_norm": "much"},
        {"total_norm": [1.0]},
        {"lr": {}},
        {"lr": 10**400},
        {"losses": 5},
        {"losses": "NaN"},
        {"losses": {"a": "x"}},
        {"thresholds": [1]},
        {"reason": "x", "culprits": [["w", 1]]},
        {"reason": "x", "culprits": 3},
        {"n_culprits": "many"},
        {"reason": "x", "spikes": 1},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_rejects_only_its_record(wrong):
    records = [as_read(step) for step in range(1, 10)]
    records[4] = {**records[4], **wrong}
    columns = read(*records)
    assert columns.step.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert columns.rejected == 1


def test_all_records_may_be_rejected():
    columns = read({"step": 1, "lr": "x"}, {"step": 2, "lr": "y"})
    assert (len(columns.step), columns.rejected) == (0, 2)


def test_the_number_of_names_is_bounded():
    reader = ColumnReader()
    for step in range(100):
        columns = reader.read([as_read(step, losses={f"loss {step}": 1.0})])
    assert len(columns.values) == 5 + MAX_NAMES
    assert reader.unnamed


def test_a_series_missing_in_a_block_becomes_nan():
    reader = ColumnReader()
    reader.read([as_read(1, losses={"a": 1.0})])
    columns = reader.read([as_read(2)])
    assert np.isnan(columns.values[Series("loss", "a")]).all()
    assert columns.bad == [] and not reader.unnamed
