"""Results: the file, the charts and the tables."""

import copy
import json

import pytest

from fastguard.commands.bench import Row
from fastguard.commands.bench.results import check, find, load, save
from fastguard.commands.bench.steps import STEPS
from guardtest import require
from guardtest.bench import ON_CPU, ROOT, SHAPES, a_case, benchmarks

targets, growth = benchmarks("targets"), benchmarks("growth")


def test_a_result_can_be_saved_and_loaded(tmp_path, result):
    path = tmp_path / "result.json"
    save(result, path)
    again = load(path)
    assert again["rows"][0]["contender"] == "torch foreach"
    assert find(again, a_case().id, "fastguard")["tensors"] == len(SHAPES)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: r.pop("machine"), "machine"),
        (lambda r: r.update(schema=99), "schema"),
        (lambda r: r.update(rows={}), "rows"),
        (lambda r: r["rows"][0].pop("io"), "io"),
        (lambda r: r["rows"][0].update(ratio={"p50": 1.0}), "p20"),
    ],
)
def test_an_invalid_result_is_refused_with_the_reason(result, spoil, says):
    spoiled = copy.deepcopy(result)
    check(spoiled)
    spoil(spoiled)
    with pytest.raises(ValueError, match=says):
        check(spoiled)


def test_committed_results_have_the_current_schema():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        if "rows" in json.loads(path.read_text()):
            load(path)


def test_charts_are_reproducible_from_the_file(tmp_path, benchmarks, result):
    require("matplotlib")
    plots = benchmarks("plots")
    source = tmp_path / "some-machine.json"
    save(result, source)
    (tmp_path / "again").mkdir()
    drawn = plots.draw(source, tmp_path)
    charts = ("ratios", "steps", "roofline", "growth")
    names = {f"some-machine-{chart}.{suffix}" for chart in charts for suffix in ("png", "svg")}
    assert {path.name for path in drawn} == names
    for path in plots.draw(source, tmp_path / "again"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    foot = plots.source_of(result)
    assert result["date"][:10] in foot and "python -m benchmarks" in foot


def test_tables_name_every_case_contender_and_target(result):
    require("rich")
    from rich.console import Console

    from fastguard.commands.bench.table import row_table

    judged = result | {"targets": targets.judge(result)}
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    for table in (row_table(result), growth.growth_table(result), targets.target_table(judged)):
        console.print(table)
    text = console.export_text()
    for column in ("case", "contender", "ratio p50 [p20..p80]", "% of limit", "norm error"):
        assert column in text
    for column in ("target", "measured"):
        assert column in text
    for name in (*ON_CPU, *STEPS):
        assert name in text
    assert targets.NOT_MEASURED in text
    console.print(targets.target_table(judged, unmeasured=False))
    assert targets.NOT_MEASURED not in console.export_text()


def test_row_fields_are_plain_json(result):
    assert json.loads(json.dumps(result["rows"][0]))["case"] == a_case().id
    assert set(result["rows"][0]) == set(Row.__annotations__)


def drawn_texts(figure):
    """The visible texts, without the labels of ticks outside of an axis."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        yield from (*axes.texts, axes.xaxis.label, axes.yaxis.label, axes._left_title)
        for axis, place in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            for label in axis.get_majorticklabels():
                if low <= label.get_position()[place] <= high and label.get_visible():
                    yield label


@pytest.mark.parametrize("name", ["ratios", "steps", "roofline", "growth"])
def test_no_label_of_a_chart_covers_another(name, benchmarks):
    require("matplotlib")
    from matplotlib.text import Text

    plots, source = benchmarks("plots"), benchmarks("tables").RESULT  # the result with charts
    with plots.plt.rc_context(plots.STYLE):
        figure = getattr(plots, name)(load(source))
        figure.canvas.draw()
    renderer, width = figure.canvas.get_renderer(), figure.bbox.width
    boxes = [
        (text.get_text(), Text.get_window_extent(text, renderer).padded(-1))
        for text in drawn_texts(figure)
        if text.get_text().strip()
    ]
    plots.plt.close(figure)
    assert [text for text, box in boxes if box.x0 < 0 or box.x1 > width] == []
    covered = [
        (text, other)
        for i, (text, box) in enumerate(boxes)
        for other, another in boxes[i + 1 :]
        if box.overlaps(another)
    ]
    assert covered == []
