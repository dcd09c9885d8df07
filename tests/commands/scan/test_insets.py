"""Tables and indented objects that a program prints between lines of text."""

from __future__ import annotations

import io
import random

import pytest

from fastguard.commands.cli import main
from fastguard.commands.scan.found import LogScan
from fastguard.commands.scan.insets import WALKED
from fastguard.commands.scan.output import as_dict
from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.scanner import scan_log
from fastguard.commands.scan.table import Table

TABLES = {
    "spaces": "step  loss   acc\n   1  0.52   0.7\n   2  nan    0.7\n",
    "tabs": "step\tloss\tacc\n1\t0.5\t0.9\n2\tnan\t3.2s\n",
    "commas": "step,loss,acc\n1,0.5,0.9\n2,nan,0.9\n",
    "semicolons": "step;loss;acc\n1;0,5;0,9\n2;nan;0,9\n",
    "markdown": "| Step | Loss | Note |\n|:----:|-----:|---|\n| 1 | 0.5 | a |\n| 2 | nan | b |\n",
    "bold": "| **step** | **loss** |\n|---|---|\n| 2 | **nan** |\n",
    "bars": "step | loss | acc\n-----|------|-----\n 2 | nan | 0.9\n",
    "grid": "+------+------+\n| step | loss |\n+======+======+\n|    2 |  nan |\n+------+------+\n",
    "box": "┏━━━━━━┳━━━━━━┓\n┃ step ┃ loss ┃\n┡━━━━━━╇━━━━━━┩\n│    2 │  nan │\n└──────┴──────┘\n",
    "rule": "  step    loss     dur\n------  ------  ------\n     2     nan   00:12\n",
    "index": "   step      loss\n0     1  0.500000\n1     2       NaN\n",
    "words": "Step   Train Loss   Val Loss\n2      nan          0.5\n",
}


def scan(text: str) -> LogScan:
    return scan_log(io.BytesIO(text.encode()))


@pytest.mark.parametrize("before", ["", "Training begins.\n\n"], ids=["first", "after text"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_header_names_the_column_and_the_step(table: str, before: str) -> None:
    (stretch,) = scan(before + table + "Training ends.\n").stretches
    assert stretch.first.step == stretch.last.step == 2
    ((value, n),) = stretch.values.items()
    assert (value.name.lower().removeprefix("train "), value.text, n) == ("loss", "nan", 1)


def test_rows_after_other_lines_belong_to_the_table_and_text_does_not() -> None:
    rows = "".join(f"{i} {'nan' if i > 20 else 0.5} 0.9\n" for i in range(60))
    found = scan(f"x\nstep loss acc\n{rows}Saving.\n60 nan 0.9\nepoch 9 loss inf\n")
    table, text = found.stretches
    assert (table.first.step, table.last.step, table.n_lines) == (21, 60, 40)
    assert text.first.epoch == 9 and text.n_lines == 1
    assert found.n_lines == 1 + 1 + 60 + 3


@pytest.mark.parametrize(
    "text",
    [
        "Training loss per epoch\n1 2 nan 4\n",
        "loss acc\n\ntext\n1 nan\n",
        "┃ Test metric ┃ DataLoader 0 ┃\n│ test_loss │ nan │\n",
        "step loss\n" + "1 0.5\n" * (WALKED // 6) + "2 nan\n",
        "12 nan 13\n",
    ],
    ids=["sentence", "apart", "metric in row", "far", "none"],
)
def test_rows_without_a_header_are_plain_lines(text: str) -> None:
    found = scan("x\n" * 4 + text)
    assert found.n_bad == 1 and found.stretches[0].dialect == "plain"


@pytest.mark.parametrize("form", ["{:4} {:8}\n", "| {} | {} |\n"], ids=["spaces", "markdown"])
def test_spikes_in_a_printed_table_are_found(form: str) -> None:
    rows = [(i, 9.0 if i == 25 else 1 + i % 7 / 100) for i in range(40)]
    found = scan("".join(form.format(*row) for row in [("step", "loss"), *rows]))
    ((series, _),) = found.series
    assert (series.name, [spike.place.step for spike in series.spikes]) == ("loss", [25])


def test_aligned_rows_read_together_and_one_by_one_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    logs = []
    for _ in range(40):
        names = rng.sample(["step", "loss", "acc", "time", "grad_norm"], 4)
        rows = [names]
        for i in range(rng.randint(5, 50)):
            cells = {"step": str(i), "time": rng.choice(["3.2s", "00:12", "-"])}
            rows.append(
                [cells.get(name, rng.choice(["nan", "0.5", "1e-3", "inf"])) for name in names]
            )
            if rng.random() < 0.05:
                rows.append([rng.choice(["Saving.", "", "epoch 4 loss: nan", "a b c d"])])
        logs.append("".join(" ".join(f"{cell:>9}" for cell in row) + "\n" for row in rows))
    together = [as_dict("", scan(log)) for log in logs]
    assert sum(found["bad_lines"] for found in together) > 300
    monkeypatch.setattr(Table, "_pattern", lambda self: None)
    assert together == [as_dict("", scan(log)) for log in logs]


def test_metric_files_of_mlflow_give_the_step() -> None:
    lines = "1700000000000 0.5 3\n1700000000100 nan 4\n1700000000200 nan 5\n"
    (stretch,) = scan(lines).stretches
    assert stretch.steps == [4, 5] and stretch.first == Place(step=4)
    (stretch,) = scan(lines.partition("\n")[2]).stretches  # from the first line on
    assert stretch.steps == [4, 5]


@pytest.mark.parametrize(("name", "judged"), [("train_loss", True), ("lr", False)])
def test_a_metric_file_of_mlflow_is_judged_by_its_name(name: str, judged: bool, tmp_path) -> None:
    values = [25.0 if i == 35 else 1 + i % 7 / 100 for i in range(60)]
    lines = [f"{1700000000000 + i} {value} {i}\n" for i, value in enumerate(values)]
    path = tmp_path / name
    path.write_text("".join(lines))
    assert main(["scan", str(path)]) == judged
    found = scan_log(io.BytesIO("".join(lines).encode()), name=name)
    assert [spike.place.step for series, _ in found.series for spike in series.spikes] == (
        [35] if judged else []
    )


@pytest.mark.parametrize(
    "text",
    [
        '{\n  "loss": NaN,\n  "epoch": 3,\n  "step": 70\n}\n',
        'metrics: {\n  "epoch": 3,\n  "step": 70,\n  "train": {\n    "loss": NaN\n  }\n}\n',
        '[\n  {\n    "loss": NaN,\n    "epoch": 3,\n    "step": 70\n  }\n]\n',
    ],
    ids=["object", "nested", "in a list"],
)
def test_indented_objects_after_text_are_read_whole(text: str) -> None:
    found = scan('Begin\n{\n  "step": 1\n}\n' + text + "end\nepoch 4 loss nan\n")
    assert found.n_bad == 2 and found.n_lines == 6 + text.count("\n")
    stretch = found.stretches[0]
    assert (stretch.first.epoch, stretch.first.step) == (3, 70)
    assert [value.name.removeprefix("train/") for value in stretch.values] == ["loss"]
    assert stretch.first_line == 5 + text[: text.index("NaN")].count("\n")


def test_objects_that_are_cut_are_read_line_by_line() -> None:
    found = scan('Begin\n{\n  "loss": NaN,\n  "step": 70\n')
    assert found.n_bad == 1 and found.stretches[0].dialect == "plain"


def test_settings_in_an_indented_object_are_no_finding() -> None:
    assert scan('Config:\n{\n  "missing": NaN,\n  "lr": 0.1\n}\n').n_bad == 0
