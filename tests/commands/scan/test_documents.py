"""JSON documents: the line of each object, lists as columns, bounded work for long strings."""

from __future__ import annotations

import io
import json
import math
import random
import time

import pytest

from fastguard.commands.scan import budget, documents
from fastguard.commands.scan.found import LogScan
from fastguard.commands.scan.scanner import scan_log


def scan(text: str, *, full: bool = False) -> LogScan:
    return scan_log(io.BytesIO(text.encode()), full=full)


def test_line_numbers_with_two_lists_of_the_same_name() -> None:
    for first in ([], [0.5, 0.25], [1.0, None]):
        value = {"train": {"log": first, "n": []}, "val": {"log": [{"step": 6, "loss": math.nan}]}}
        text = json.dumps(value, indent=1)
        found = scan(text)
        line = 1 + text[: text.index('"step"')].count("\n") - 1
        assert found.stretches[0].first.step == 6 and found.stretches[0].first_line == line


@pytest.mark.parametrize("odd", ["a } b", "{", "}{", '"{', '\\"{', "\\\\", "\\"])
@pytest.mark.parametrize("indent", [None, 1, 4])
def test_braces_and_quotes_in_strings_do_not_shift_the_lines(odd: str, indent: int | None) -> None:
    rows = [{"step": i, "note": odd if i % 7 == 3 else "x", "loss": 0.5} for i in range(40)]
    rows[25]["loss"] = rows[39]["loss"] = math.nan
    text = json.dumps({"note": odd, "log_history": rows, odd: [{"a": 1}]}, indent=indent)
    steps = [s for stretch in scan(text).stretches for s in stretch.steps]
    lines = [stretch.first_line for stretch in scan(text).stretches]
    before = [text[: text.index(f'"step": {i}')].count("\n") for i in (25, 39)]
    assert steps == [25, 39]
    assert lines == [n + (indent is None) for n in before]


@pytest.mark.parametrize("name", ["loss", "value"])
def test_lists_of_numbers_equal_the_same_data_as_objects(name: str) -> None:
    rng = random.Random(1)
    odd = [math.nan, math.inf, None, "nan", "0.5", True]
    values = [rng.choice(odd) if rng.random() < 0.1 else rng.random() for _ in range(9000)]
    short = values[:5000]
    columns = {name: values, "val_loss": short}
    rows = [
        {"epoch": i + 1, name: value, **({"val_loss": short[i]} if i < 5000 else {})}
        for i, value in enumerate(values)
    ]
    found, expected = scan(json.dumps(columns)), scan(json.dumps(rows), full=True)
    assert found.n_lines == expected.n_lines == 9000
    assert found.n_bad == expected.n_bad > 400
    assert [s.values for s in found.stretches] == [s.values for s in expected.stretches]
    assert [s.first for s in found.stretches] == [s.first for s in expected.stretches]


def test_long_strings_are_read_within_the_budget(monkeypatch) -> None:
    monkeypatch.setattr(budget, "FIRST", 20_000)
    text = "epoch 3 loss nan " + "alpha nan beta 0.5 " * 50_000
    found = scan(json.dumps({"text": text}))
    assert found.stretches[0].first.epoch == 3
    assert found.counted.n_nonfinite == 1 and found.counted.first_line == 1
    full = scan(json.dumps({"text": text}), full=True)
    assert not full.counted.n_lines and full.n_bad == 1


def test_long_string_without_the_words_is_read_to_its_end() -> None:
    found = scan(json.dumps({"text": "alpha nano beta " * 20_000 + "epoch 7: loss is nan"}))
    assert found.n_bad == 1 and not found.counted.n_lines


def test_document_above_the_size_limit_is_read_as_lines(monkeypatch) -> None:
    monkeypatch.setattr(documents, "LIMIT", 1 << 21)
    rows = "".join(f'{{"step": {i}, "loss": 0.5}},\n' for i in range(150_000))
    found = scan("[\n" + rows + '{"step": 150000, "loss": NaN}\n')
    assert found.n_bad == 1 and found.stretches[0].first_line == 150_002


def test_nested_lists_report_each_kind_in_order() -> None:
    (stretch,) = scan('{"step": 6, "norms": [1.0, [-Infinity, [NaN]], Infinity, "x"]}').stretches
    assert [value.text for value in stretch.values] == ["-inf", "nan", "inf"]


def test_time_for_one_object_is_linear_in_its_number_of_names() -> None:
    def seconds(n: int) -> float:
        text = json.dumps({f"layer{i}": [math.nan, 0.5] for i in range(n)})
        times = []
        for _ in range(3):
            begun = time.process_time()
            assert scan(text).n_bad
            times.append(time.process_time() - begun)
        return min(times)

    assert seconds(32_000) < 24 * seconds(4_000)


ROWS = [{"step": 10 * i, "loss": 0.5 + 0.01 * (i % 3)} for i in range(40)]
ROWS[25]["loss"] = 30.0
ROWS[30]["loss"] = math.nan


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), 1 + 25 * 4),
        (",\n".join(json.dumps(row, indent=4) for row in ROWS), 1 + 25 * 4),
        ("\n\n".join(json.dumps(row, indent="\t") for row in ROWS), 1 + 25 * 5),
        ("[\n" + ",\n".join(map(json.dumps, ROWS)) + ",\n", 2 + 25),
        ("[\n" + ",\n".join(map(json.dumps, ROWS)) + ',\n{"step": 40', 2 + 25),
        ("".join(map(json.dumps, ROWS)), 1),
        ("".join(f"\x1e{json.dumps(row)}\n" for row in ROWS), 26),
        ("".join(f"  {json.dumps(row)}\n" for row in ROWS), 26),
        ("".join(json.dumps(row).replace("{", "{ ") + "\n" for row in ROWS), 26),
    ],
    ids="indented commas blank-lines open-list cut-list one-line separators spaces braces".split(),
)
def test_sequences_of_objects(text: str, line: int) -> None:
    found = scan(text)
    assert found.n_bad == 1 and found.stretches[0].steps == [300]
    ((series, _),) = found.series
    assert [(spike.place.step, spike.line) for spike in series.spikes] == [(250, line)]


def test_text_after_a_sequence_is_read() -> None:
    text = "\n".join(json.dumps(row, indent=1) for row in ROWS) + "\nepoch 3 grad norm inf\n"
    found = scan(text)
    assert [stretch.first_line for stretch in found.stretches] == [1 + 30 * 4, 1 + 40 * 4]


def test_sequence_longer_than_a_block() -> None:
    text = "".join(json.dumps({"step": i, "loss": 0.5}, indent=1) + "\n" for i in range(40_000))
    found = scan(text + json.dumps({"step": 40_000, "loss": math.nan}, indent=1))
    assert found.n_bad == 1 and found.stretches[0].steps == [40_000]
    assert found.stretches[0].first_line == 160_001


def test_lists_beside_columns_are_read() -> None:
    found = scan(json.dumps({"columns": ["step", "loss"], "data": [[1, 0.5], [2, math.nan]]}))
    assert found.n_bad == 1


def test_history_in_an_object() -> None:
    found = scan(json.dumps({"history": {"loss": [0.5, math.nan]}, "params": {"epochs": 2}}))
    assert found.stretches[0].first.epoch == 2
