"""Untrusted records: their text is never markup, and no value raises an error."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastguard.commands.cli import main
from fastguard.commands.report.summary import summarize
from fastguard.commands.report.verdict import judge
from fastguard.records.read_json_lines import Block, read_blocks
from guardtest import require
from guardtest.odd_records import FIELDS, good

require("plotly")
draw = require("fastguard.commands.report.figure").draw
render = require("fastguard.commands.report.page").render

LINK = "<a href='https://evil.example/'>click</a>"
TEXTS = {
    "link": LINK,
    "markup": "<b>bold</b><br>next<sup>2</sup>",
    "style": "<span style='font-size:900px'>x</span>",
    "end of script": "</script><script>alert(1)</script>",
    "end of hover": "</extra><a href='javascript:alert(1)'>x</a>",
    "entity": "&lt;a href='https://evil.example/'&gt;x&#60;/a&#62;",
    "hover template": "%{customdata} %{fullData.name}",
    "attribute": "\" onclick='alert(1)' x=\"",
    "escape code": "\x1b[2J\x9b2J\a",
    "lines": "a\nfastguard report: fine\r\u2028b",
    "override": "\u202egnihton",
    "no utf-8": "\udce9\udcff",
    "digits": "a\u00b23.\u2460.\u0663.\u0968",
}


def header(text: str) -> dict[str, Any]:
    """A header with this text in every text field."""
    fields = ("fastguard", "name", "python", "torch", "triton", "host", "device")
    return {
        "kind": "header",
        "time": 1.5e9,
        "guards": [text, f"b {text}"],
        **dict.fromkeys(fields, text),
    }


def rows(text: str) -> list[dict[str, Any]]:
    """A run with this text in every text field of its records."""
    found = []
    for step in range(1, 121):
        row: dict[str, Any] = {
            "step": step,
            "total_norm": 1.0 + step % 7,
            "clip_coef": 1.0,
            "action": "applied",
            "lr": 0.1,
            "losses": {text: 1.0 + step / 10, "b" + text: 0.5, "c": 1.0},
            "thresholds": {text: 9.0, "grad_norm": 9.0, "d" + text: 1.0},
        }
        if step % 10 == 0:
            row |= {"reason": text, "action": text + " done", "spikes": [text], "tag": text}
            row |= {"culprits": [[text, 1, 0, 0], [f"e.{text}.w", 0, 1, 0]], "n_culprits": 20}
        if step % 10 == 5:
            row |= {"reason": "nonfinite_loss", "action": "skipped", "tag": {text: [text]}}
            row |= {"losses": {text: "NaN", "c": 1.0}}
        if step % 10 == 3:
            layers = {text: 1.0 + step, f"e.{text}.w": 2.0, "e.10.w": 1.0}
            row |= {"watch": {"tensor_norms": layers, "update_ratio": layers}}
        found.append(row)
    return [*found, *found[:14]]  # the step number goes back


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


class Page(HTMLParser):
    """The elements, attributes and links that a browser would find."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes.update(name for name, _ in attrs)
        self.links += [value or "" for name, value in attrs if name == "href"]


def page_of(text: str) -> str:
    summary = summarize([Block(rows(text), 0, 0, [header(text)])])
    return render(f"{text}.jsonl", summary, judge(summary))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_from_records_is_never_markup_in_the_plots(text: str) -> None:
    figure = draw(summarize([Block(rows(text), 0, 0)]))
    plain = draw(summarize([Block(rows("plain"), 0, 0)]))
    ours = set(strings(plain.to_plotly_json()))  # templates and titles written in this package
    theirs = set(strings(figure.to_plotly_json())) - ours
    assert len(theirs) > 10
    for found in theirs:
        assert "<" not in found and ">" not in found
        assert found.isprintable() and found.encode()
        # Plotly decodes these entities once, which gives back the text of the records.
        assert "&" not in found.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_from_records_is_never_markup_in_the_page(text: str) -> None:
    page = page_of(text)
    found, plain = Page(page), Page(page_of("plain"))
    assert found.elements == plain.elements and found.attributes == plain.attributes
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert page.encode()
    assert "alert(1)</script>" not in page
    for character in "\x1b\x9b\u202e\u2028\a":
        assert character not in page.split("<script")[0]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_output_of_the_command_is_printable(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / text.replace("/", "_")
    folder.mkdir()
    lines = [header(text), *rows(text)]
    (folder / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(folder)]) == 0
    assert main(["monitor", "--once", str(folder)]) == 1
    printed = capsys.readouterr()
    for line in (printed.out + printed.err).split("\n"):
        assert line.isprintable()
        assert not line.startswith("fastguard report: fine")


ODD = [
    None, True, -1, 0, 3, 2**53, 10**25, 10**400, 1e308, -1e308, 5e-324, 1e999, -1e999, 1e200,
    float("nan"), "", "3", "NaN", "Infinity", "-inf", "many", [], [1], [[1]], [["w", 1, 0, 0]],
    {}, {"a": 1}, {"a": None}, {"a": "NaN"}, {"a": 1e308, "b": -1e308}, {"a": [1]}, [None],
    ["a", 3], [["w", 1]], [[["w"], 1, 0, 0]], [["w", "NaN", 0, 0]], [[None, 1e3, 0, 0]] * 50,
    "x" * 10_000,
]  # fmt: skip


def assert_is_reported(records: list[dict[str, Any]], path: Path) -> None:
    """Checks that a report on these records is created without a warning."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = summarize(read_blocks(path))
        verdict = judge(summary)
        assert render(path.name, summary, verdict).encode()
    assert summary.records + summary.damaged == len(records)
    assert all(line.isprintable() for line in (verdict.headline, *verdict.findings))


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_in_every_field_are_handled(field: str, tmp_path: Path) -> None:
    odd = itertools.cycle(ODD)
    records = []
    for step in range(1, 4 * len(ODD)):
        row = good(step)
        if step % 2:
            row |= {"reason": "nonfinite_grad", "action": "skipped"} if step % 4 == 1 else {}
            row[field] = next(odd)
        records.append(row)
    assert_is_reported(records, tmp_path / "r.jsonl")


@pytest.mark.parametrize("seed", range(20))
def test_odd_values_in_several_fields_are_handled(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    records = []
    for step in range(1, 200):
        row = good(step)
        for field in rng.sample(FIELDS, rng.choice([0, 0, 1, 2, 5, len(FIELDS)])):
            row[field] = rng.choice(ODD)
        for field in rng.sample(sorted(row), rng.choice([0, 0, 0, 1, 3])):
            del row[field]
        records.append(row)
    records[0] = good(1)
    assert_is_reported(records, tmp_path / "r.jsonl")


def test_memory_is_bounded_for_any_number_of_names() -> None:
    def blocks() -> Iterator[Block]:
        for block in range(25):
            found = []
            for k in range(100):
                new = f"{block} {k} " + "x" * 1000
                row = good(100 * block + k + 1)
                row |= {"losses": {new: 1.0, new + "b": "NaN"}, "thresholds": {new: 1.0}}
                row |= {"action": new, "reason": new, "spikes": [new] * 20, "tag": [new] * 50}
                row |= {"culprits": [[f"{i}{new}", 1, 0, 0] for i in range(50)]}
                found.append(row)
            yield Block(found, 0, 0)

    tracemalloc.start()
    summary = summarize(blocks())
    page = render("r", summary, judge(summary))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert len(summary.actions) <= 33 and len(summary.events.names) <= 65
    assert len(page) < 8e6  # including the plotting library
