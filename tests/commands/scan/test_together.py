"""Reading many lines at once gives the same results as reading line by line."""

from __future__ import annotations

import io
import json
import math
import random

import pytest

from fastguard.commands.scan import bare, findings, json_lines, objects, shapes
from fastguard.commands.scan.json_lines import JsonLines
from fastguard.commands.scan.output import as_dict
from fastguard.commands.scan.scanner import scan_log
from fastguard.commands.scan.shapes import Shapes
from fastguard.commands.scan.table import Table

CELLS = ["nan", "0.5", "", "1e-3", "inf", "-inf", "12", " 0.7", "1e999", "x nan y", "best", '"3"']
NAMES = ["epoch", "step", "loss", "val_loss", "lr", "grad_norm", "best_loss", "time", "note"]


def table(rng: random.Random) -> list[str]:
    delimiter = rng.choice(",;\t")
    names = rng.sample(NAMES, rng.randint(2, 6))
    lines = [delimiter.join(names)]
    for i in range(rng.randint(5, 60)):
        places = {"epoch": str(i // 10), "step": str(i)} if rng.random() < 0.97 else {}
        cells = (rng.choice(CELLS) if rng.random() < 0.2 else f"{rng.random():.3f}" for _ in names)
        lines.append(delimiter.join(places.get(n, c) for n, c in zip(names, cells, strict=True)))
        if rng.random() < 0.03:
            lines.append(rng.choice([lines[0], "", "Saving.", "epoch 4 loss: nan", "# note"]))
    return lines


def json_objects(rng: random.Random) -> list[str]:
    odd = [math.nan, None, True, "nan", "0.5", "loss nan", "-Infinity", math.inf, 10**400, -1]
    special = {
        "msg": lambda: rng.choice(["ok", "loss nan", "epoch 3", "nan"]),
        "key": lambda: rng.choice(["loss", "lr"]),
        "inner": lambda: {"loss": rng.choice([0.1, math.nan]), "x": [rng.choice([1, math.nan])]},
        "list": lambda: [rng.random(), rng.choice([1, 2, 3, math.nan, [math.nan], {"a": 1}])],
    }
    names = rng.sample([*NAMES, *special, "value", "val/loss"], rng.randint(2, 7))
    lines = []
    for i in range(rng.randint(5, 60)):
        found = {
            "epoch": i // 10,
            "step": i,
            **{name: rng.random() for name in names},
            **{name: special[name]() for name in names if name in special},
        }
        kept = {name: found[name] for name in names if rng.random() > 0.03}
        if rng.random() < 0.2 and kept:
            kept[rng.choice([*kept])] = rng.choice(odd)
        lines.append(json.dumps(kept))
        if rng.random() < 0.03:
            lines.append(rng.choice(["", "Saving.", "epoch 4 loss: nan", '{"cut', "loss 0.5"]))
    return lines


def numbers(rng: random.Random) -> list[str]:
    def value() -> str:
        return rng.choice(["nan", "0.5", "-inf", "inf", "1e-3", "12", "NaN", "3.", "+7"])

    lines = ["start"]
    for _ in range(rng.randint(5, 60)):
        many = ", ".join(value() for _ in range(rng.randint(1, 5)))
        forms = [
            value(),
            f"[ {many}],",
            many,
            many.replace(",", ""),
            f"  [[{many}]]",
            f"{value()},",
        ]
        others = ["[3, 2000]", "[1, nan]", "epoch 3 loss nan", "loss 0.5", "", "text", "(nan)"]
        lines.append(rng.choice(forms if rng.random() < 0.9 else others))
    return lines


def repeated(rng: random.Random) -> list[str]:
    forms = [
        "loss nan",
        "epoch {e} batch {b}/900 loss: nan",
        "epoch {e}.{b} loss{d}: nan",
        "step {b} nan gradients: {d}",
        "step {b} loss 0.{b}",
        "  {e}/100  2.1G  nan  0.{b}  {d}  640: 37% ----- {b}/900",
    ]
    lines = []
    for _ in range(rng.randint(1, 8)):
        form, e, b, d = (rng.choice(forms), rng.randint(1, 9), rng.randint(100, 700), 1)
        for _ in range(rng.choice([3, 16, 17, 70, 150])):
            lines.append(form.format(e=e, b=b, d=d))
            b += 1
            e += rng.random() < 0.02
            d = rng.randint(0, 2) if rng.random() < 0.05 else d
    return lines


@pytest.mark.parametrize("lines_of", [table, json_objects, numbers, repeated])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_bulk_and_individual_reading_agree(lines_of, end: str, monkeypatch) -> None:
    logs = [end.join([*lines_of(random.Random(seed)), ""]).encode() for seed in range(80)]
    together = [as_dict("", scan_log(io.BytesIO(log))) for log in logs]
    monkeypatch.setattr(objects, "MIN_OBJECTS", 10**9)
    monkeypatch.setattr(bare, "MIN_LINES", 10**9)
    monkeypatch.setattr(shapes, "ALIKE", 10**9)
    monkeypatch.setattr(Table, "_pattern", lambda self: None)
    for log, found in zip(logs, together, strict=True):
        alone = as_dict("", scan_log(io.BytesIO(log)))
        for each in (found, alone):
            each["series"].sort(key=lambda series: series["name"])
        assert repr(found) == repr(alone), log.decode()
    assert sum(found["bad_lines"] for found in together) > 100


@pytest.mark.parametrize(
    ("head", "row", "reader", "method"),
    [
        ("epoch,step,loss\n", "{e},{i},{x}\n", Table, "_row"),
        ('"epoch";"loss";"note"\r\n', '"{e}";"{x}";"ok"\r\n', Table, "_row"),
        ("", '{{"epoch": {e}, "step": {i}, "loss": {x}}}\n', JsonLines, "read"),
        ("", '{{"_step": {i}, "train": {{"loss": "{x}", "note": null}}}}\n', JsonLines, "read"),
        ("start\n", "{x}\n", Shapes, "of"),
        ("start\n", "  [{x}, nan, {x}],\n", Shapes, "of"),
    ],
    ids=["csv", "quoted", "json", "nested", "values", "array"],
)
@pytest.mark.parametrize("bad", [False, True], ids=["finite", "bad"])
def test_few_lines_are_read_individually(head, row, reader, method, bad, monkeypatch) -> None:
    calls = []
    read = getattr(reader, method)
    monkeypatch.setattr(reader, method, lambda *given: calls.append(1) or read(*given))
    values = ["NaN" if bad and i % 3 else f"{1 + i % 7 / 100}" for i in range(20_000)]
    text = head + "".join(row.format(e=i // 1000, i=i, x=x) for i, x in enumerate(values))
    found = scan_log(io.BytesIO(text.encode()))
    assert found.n_lines == 20_000 + bool(head) and bool(found.n_bad) == (bad or "nan" in row)
    assert len(calls) < 100


@pytest.mark.parametrize("broken", [1, 50], ids=["each", "some"])
def test_truncated_lines_do_not_slow_down_the_others(broken: int, monkeypatch) -> None:
    sizes = []
    parse = json_lines.parse
    monkeypatch.setattr(json_lines, "parse", lambda text: sizes.append(len(text)) or parse(text))
    lines = [json.dumps({"step": i, "loss": 1 + i % 7 / 100}) for i in range(5000)]
    lines = [line[:20] if i % broken == 0 else line for i, line in enumerate(lines)]
    text = "".join(f"{line}\n" for line in lines)
    found = scan_log(io.BytesIO(text.encode()))
    assert found.n_lines == 5000
    # Trying all following lines for each line would be a factor of 500.
    assert sum(sizes) < 20 * len(text)


def _random_rows(seed: int) -> tuple[str, str]:
    """The same random rows with NaN as CSV and as JSON lines."""
    rng = random.Random(seed)
    share = rng.choice([0.05, 0.5, 1.0])
    names = ["epoch", "step", "loss", "val_loss"][seed % 2 :]
    table, lines = ",".join(names) + "\n", ""
    for i in range(2000):
        row: dict[str, object] = {"epoch": i // 40, "step": i}
        for name in ("loss", "val_loss"):
            row[name] = rng.choice(["nan", "inf"]) if rng.random() < share else rng.random()
        table += ",".join(str(row[name]) for name in names) + "\n"
        lines += json.dumps({name: row[name] for name in names}) + "\n"
    return table, lines


@pytest.mark.parametrize("seed", range(6))
def test_counting_bad_rows_together_or_one_by_one_agrees(seed: int, monkeypatch) -> None:
    for text in _random_rows(seed):
        found = scan_log(io.BytesIO(text.encode()))
        with monkeypatch.context() as patch:
            patch.setattr(findings, "STEPS", 10**9)  # each row is then added individually
            alone = scan_log(io.BytesIO(text.encode()))
        for stretch in alone.stretches:
            del stretch.steps[findings.STEPS :]
        assert found.stretches == alone.stretches
        with monkeypatch.context() as patch:
            patch.setattr(findings, "KEPT", 3)
            counted = scan_log(io.BytesIO(text.encode()))
        assert counted.n_stretches == found.n_stretches and counted.n_bad == found.n_bad
        assert counted.stretches == found.stretches[:3]
