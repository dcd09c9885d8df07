"""The figure shows every incident, every extreme, and each step around an incident."""

import math

import numpy as np
import pytest

from fastguard import StepRecord
from fastguard.commands.report.columns import NORM, Series
from fastguard.commands.report.summary import summarize
from fastguard.records.read_json_lines import Block
from guardtest import require

require("plotly")
drawing = require("fastguard.commands.report.figure")
draw = drawing.draw

STEPS = 5000
BAD = (700, 701, 2345, 4999)


def record(step, **more):
    bad = step in BAD
    fields = {
        "total_norm": 500.0 if step == 1234 else 2 + math.sin(step),
        "clip_coef": 1.0,
        "action": "skipped" if bad else "applied",
        "reason": "nonfinite_grad" if bad else None,
        "culprits": (("blocks.10.w", 1, 0, 0), ("blocks.9.w", 1, 0, 0)) if bad else (),
        "n_culprits": 2 if bad else 0,
        "losses": {"seg": 1.0, "contour": math.nan if bad else 0.5},
        "thresholds": {"grad_norm": 9.0, "seg": 3.0},
        "lr": 1e-3,
    }
    return StepRecord(step, **(fields | more)).as_dict()


@pytest.fixture(scope="module")
def summary():
    return summarize([Block([record(step) for step in range(1, STEPS + 1)], 0, 0)])


@pytest.fixture(scope="module")
def figure(summary):
    return draw(summary)


def traces(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def test_rows_share_the_step_axis(figure):
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == [
        f"<b>{title}</b>"
        for title in (
            "Loss", "Gradient norm", "Clip coefficient", "Learning rate", "Incidents",
            "Non-finite gradients by layer",
        )
    ]  # fmt: skip
    axes = [figure.layout[f"xaxis{i or ''}"] for i in ("", 2, 3, 4, 5, 6)]
    assert len({axis.matches for axis in axes[:-1]}) == 1
    domains = [figure.layout[f"yaxis{i or ''}"].domain for i in ("", 2, 3, 4, 5, 6)]
    bottoms, tops = zip(*domains, strict=True)
    assert all(low > top for low, top in zip(bottoms, tops[1:], strict=False))


def test_every_incident_is_marked(figure):
    (marks,) = traces(figure, "skipped")
    assert list(marks.x) == list(BAD)
    assert all(text.startswith("step ") and "more" not in text for text in marks.text)


def test_marks_for_several_incidents_show_their_number():
    bad = {"action": "skipped", "reason": "nonfinite_loss"}
    rows = [record(step, **(bad if step % 2 else {})) for step in range(1, 6001)]
    texts = [t for m in traces(draw(summarize([Block(rows, 0, 0)])), "skipped") for t in m.text]
    more = [int(text.split(" and ")[1].split(" ")[0]) for text in texts if " and " in text]
    assert len(texts) <= 1024 + 1
    assert len(texts) + sum(more) == 3000 + 1  # odd steps, and step 700


def test_extremes_and_steps_around_incidents_are_on_the_line(summary):
    x, y = summary.curves[NORM].x, summary.curves[NORM].y
    assert (1234, 500.0) in set(zip(x, y, strict=True))
    assert set(range(2345 - 16, 2345 + 17)) <= set(x)
    assert np.all(np.diff(x) >= 0) and len(x) < 2500
    contour = summary.curves[Series("loss", "contour")]
    assert set(BAD) == set(contour.x[np.isnan(contour.y)])  # the line has gaps there


def test_the_norm_of_a_step_with_nan_is_a_gap():
    bad = {"nan": 3, "total_norm": 1e-9}
    rows = [record(step, **(bad if step in BAD else {})) for step in range(1, 5001)]
    curve = summarize([Block(rows, 0, 0)]).curves[NORM]
    assert set(BAD) == set(curve.x[np.isnan(curve.y)])
    assert np.nanmin(curve.y) >= 1.0


def test_every_curve_has_a_mark_at_each_bad_step(figure):
    marks = [trace for trace in figure.data if trace.meta == "mark"]
    assert [list(trace.x) for trace in marks] == [list(BAD)] * 4
    over = {figure.layout[f"yaxis{trace.yaxis[1:]}"].overlaying for trace in marks}
    assert over == {"y", "y2", "y3", "y4"}


def test_the_axis_of_a_constant_learning_rate_fits_its_size(figure):
    lr, *_ = traces(figure, "learning rate")
    assert tuple(figure.layout[f"yaxis{lr.yaxis[1:]}"].range) == (0.0, 1.5 * 1e-3)


def test_zooming_in_shows_bars_of_exact_length(figure):
    (bars,) = [trace for trace in figure.data if trace.meta == "detail"]
    spans = {(a, b) for a, b in zip(bars.x, bars.x[1:], strict=False) if None not in (a, b)}
    assert spans == {(699.5, 701.5), (2344.5, 2345.5), (4998.5, 4999.5)}
    assert bars.visible is False and "bad in steps 700 to 701" in bars.text[0]


def test_the_threshold_of_a_signal_is_drawn(figure):
    (norm,) = traces(figure, "threshold")
    (seg,) = traces(figure, "threshold of seg")
    assert norm.yaxis == "y2" and seg.yaxis == "y"
    assert set(norm.y) == {9.0} and set(seg.y) == {3.0}


def test_a_norm_over_orders_of_magnitude_has_a_logarithmic_axis(figure):
    assert figure.layout.yaxis2.type == "log"
    assert figure.layout.yaxis.type != "log"


def test_a_norm_of_zero_is_not_drawn_on_a_logarithmic_axis():
    rows = [record(step, total_norm=[0.0, 1.0, 900.0][step % 3]) for step in range(1, 100)]
    figure = draw(summarize([Block(rows, 0, 0)]))
    assert figure.layout.yaxis2.type == "log"
    (norm,) = traces(figure, "gradient norm")
    assert {y for y in norm.y if math.isfinite(y)} == {1.0, 900.0}


@pytest.mark.parametrize("values", [(0.0, 1000.0), (-5.0, 1000.0), (1.0, 40.0)])
def test_a_loss_with_zeros_or_a_narrow_range_has_a_linear_axis(values):
    rows = [record(step, losses={"loss": values[step % 2]}) for step in range(1, 100)]
    assert draw(summarize([Block(rows, 0, 0)])).layout.yaxis.type != "log"


def test_the_heat_map_counts_bad_steps_by_layer_in_natural_order(figure):
    (heat,) = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [row[0] for row in heat.customdata] == ["blocks.9", "blocks.10"]
    assert np.nansum(heat.z, axis=1).tolist() == [len(BAD), len(BAD)]
    width = heat.dx
    for step in BAD:
        column = int(np.argmin(np.abs(np.array(heat.x) - step)))
        assert abs(heat.x[column] - step) <= width / 2 and heat.z[0][column] >= 1


def test_a_run_without_incidents_has_no_rows_for_incidents():
    records = [record(step) for step in range(1, 100)]
    titles = [a.text for a in draw(summarize([Block(records, 0, 0)])).layout.annotations]
    assert len(titles) == 4


def test_few_steps_are_drawn_individually():
    figure = draw(summarize([Block([record(step) for step in range(1, 50)], 0, 0)]))
    (seg,) = traces(figure, "seg")
    assert list(seg.x) == list(range(1, 50))
    assert not [trace for trace in figure.data if trace.meta == "mean"]


def test_a_single_step_is_drawn_as_a_marker():
    figure = draw(summarize([Block([record(1)], 0, 0)]))
    assert {trace.mode for trace in figure.data} == {"markers"}


def test_names_are_escaped():
    losses = {"<b>x</b>": 1.0, "<a href='javascript:1'>": 2.0}
    figure = draw(summarize([Block([record(1, losses=losses), record(2, losses=losses)], 0, 0)]))
    assert all("<" not in (trace.name or "") for trace in figure.data)


def test_a_summary_without_data_has_an_empty_figure():
    assert not draw(summarize([Block([{"step": 1}], 0, 0)])).data
    assert not draw(summarize([])).data


def test_the_limit_is_drawn_with_the_norm():
    records = [record(step, limit=math.inf if step < 3 else 3.0 + step) for step in range(1, 9)]
    (trace,) = traces(draw(summarize([Block(records, 0, 0)])), "limit")
    drawn = dict(zip(trace.x, trace.y, strict=True))
    assert {step: drawn[step] for step in range(3, 9)} == {step: 3.0 + step for step in range(3, 9)}


def test_the_share_of_clipped_units_is_drawn_with_the_coefficient():
    records = [record(step, clipped_units=step, limited_units=10) for step in range(1, 9)]
    figure = draw(summarize([Block(records, 0, 0)]))
    (share,), (coef,) = traces(figure, "share of clipped units"), traces(figure, "clip coefficient")
    assert share.y.tolist() == pytest.approx([step / 10 for step in range(1, 9)])
    assert share.yaxis == coef.yaxis


def test_a_run_without_a_limit_has_no_line_for_a_limit(figure):
    assert all(not np.isfinite(trace.y).any() for trace in traces(figure, "limit"))


def test_a_value_between_two_gaps_is_drawn_as_a_point():
    """A line of one point would be invisible, here the norm of a spike between two NaN."""
    bad = {"action": "skipped", "reason": "nonfinite_grad", "nan": 1}
    spike = {"action": "skipped", "reason": "grad_spike", "total_norm": 70.0, "culprits": ()}
    records = [
        record(step, **{5: bad, 6: spike, 7: bad}.get(step, {"total_norm": 2.0}))
        for step in range(1, 12)
    ]
    figure = draw(summarize([Block(records, 0, 0)]))
    points = [trace for trace in figure.data if trace.meta == "isolated"]
    assert [(list(p.x), list(p.y), p.mode) for p in points] == [([6], [70.0], "markers")]
    assert points[0].yaxis == "y2" and not points[0].showlegend
