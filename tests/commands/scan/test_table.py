"""In CSV and TSV with a header, the columns give names, epoch and step."""

from __future__ import annotations

import io
import time

import pytest

from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.scanner import LogScan, scan_log


def scan(text: str) -> LogScan:
    return scan_log(io.BytesIO(text.encode()))


def values(found: LogScan, i: int = 0) -> set[str]:
    return {f"{name} {text}" for name, text in found.stretches[i].values}


LIGHTNING = """epoch,step,train_loss,val_loss
0,9,0.5,
0,9,,0.4
1,19,nan,
1,19,,0.4
1,29,nan,
2,39,0.5,
2,39,,nan
"""


def test_lightning_csv_logger() -> None:
    found = scan(LIGHTNING)
    first, second = found.stretches
    assert first.dialect == "table" and (first.first_line, first.last_line) == (4, 6)
    assert (first.first, first.last) == (Place(1, step=19), Place(1, step=29))
    assert values(found, 0) == {"train_loss nan"} and values(found, 1) == {"val_loss nan"}
    assert second.first == Place(2, step=39)


@pytest.mark.parametrize(
    "text, place, value",
    [
        ("step,loss,val\n1,1.0,\n2,nan,\n", Place(step=2), "loss nan"),
        ("epoch\tstep\tloss\n3\t70\tinf\n", Place(3, step=70), "loss inf"),
        ("loss;epoch\n1,5;1\nnan;2\n", Place(2), "loss nan"),
        ("# epoch,loss\n1,0.5\n2,-inf\n", Place(2), "loss -inf"),
        (",epoch,loss\n0,1,0.5\n1,2,nan\n", Place(2), "loss nan"),
        ('"epoch","train, loss"\n"2","nan"\n', Place(2), "train, loss nan"),
        (
            "                  epoch,      train/box_loss\n    3,    nan\n",
            Place(3),
            "train/box_loss nan",
        ),
        ("trainer/global_step,_step,loss\n7,8,NaN\n", Place(step=7), "loss nan"),
        ("epoch,batch_idx,loss\n1.5,4.0,nan\n", Place(1.5, batch=4), "loss nan"),
        ("\ufeffepoch,loss\r\n1,nan\r\n", Place(1), "loss nan"),
        ("epoch,loss\n1,0.5\nepoch,lr,loss\n2,0.1,nan\n", Place(2), "loss nan"),
        ("epoch,loss\n1,0.5\n" + "Saving.\nepoch 4 loss: nan\n", Place(4), "loss nan"),
        ("epoch,loss\nnan,nan\n", Place(), "loss nan"),
    ],
    ids=lambda value: repr(value) if isinstance(value, str) else "",
)
def test_headers_of_many_tools(text: str, place: Place, value: str) -> None:
    found = scan(text)
    assert found.n_bad == 1 and values(found) == {value}
    assert found.stretches[0].first == place


@pytest.mark.parametrize(
    "form", ["epoch:{},loss:{}", "epoch {}, loss {}", "epoch={}, loss={}", "epoch: {}, loss: {}"]
)
def test_printed_lines_with_commas_are_not_a_table(form: str) -> None:
    found = scan("\n".join(form.format(i, x) for i, x in enumerate(["0.5", "1e-3", "nan"])))
    assert found.stretches[0].dialect == "plain" and values(found) == {"loss nan"}
    assert found.stretches[0].first == Place(2)


def test_unusual_column_names() -> None:
    found = scan("epoch,top 5 acc,lr-Adam/pg1,loss|val,a+b,_x,Δ loss\n3,1,1,inf,1,1,nan\n")
    assert values(found) == {"loss|val inf", "Δ loss nan"}


def test_bounds_and_clocks_in_tables_are_ignored() -> None:
    assert scan("epoch,best_loss,eta,loss\n1,inf,nan,0.5\n").n_bad == 0


def test_sentence_with_commas_is_not_a_header() -> None:
    found = scan("Training, with loss of epoch 1, begins.\nepoch 3, loss: nan\n")
    assert found.stretches[0].dialect == "plain" and found.stretches[0].first == Place(3)
    found = scan("Training, with loss of epoch 1, begins.\nepoch 3, loss: nan, stopping\n")
    assert found.stretches[0].dialect == "plain" and values(found) == {"loss nan"}
    assert scan("Training, loss of epoch 1.\nepoch 3, checks for nan\n").n_bad == 0


@pytest.mark.parametrize("piece", [",", "a,", '"', '",', "nan,", "\t", "1,"], ids=repr)
def test_time_per_row_is_bounded(piece: str) -> None:
    line = piece * (20_000 // len(piece))
    begun = time.process_time()
    scan(f"epoch,loss{line}\n{line}\n1,nan{line}\n")
    assert time.process_time() - begun < 2.0


def test_note_about_nan_does_not_hide_a_value_in_its_row() -> None:
    text = "epoch,step,loss,note\n0,1,0.5,ok\n0,2,nan,loss became nan here\n0,3,0.4,fine\n"
    (stretch,) = scan_log(io.BytesIO(text.encode())).stretches
    assert (stretch.first.step, stretch.first_line, stretch.dialect) == (2, 3, "table")
    assert [tuple(value) for value in stretch.values] == [("loss", "nan")]


def test_decimal_commas_and_numpy_steps_are_numbers() -> None:
    for form in ("{0};{1}", "{0:.18e};{1:.18e}", "{0}\t{1}"):
        rows = [(10 * i, 30.0 if i == 25 else 0.5) for i in range(40)]
        text = "".join(form.format(*row).replace(".", ",") + "\n" for row in rows)
        head = "step;loss\n".replace(";", "\t" if "\t" in form else ";")
        ((series, _),) = scan(head + text).series
        place = series.spikes[0].place
        assert place.step == 250


def test_names_with_spaces_are_places() -> None:
    found = scan("Global Step,Train Loss\n10,0.5\n20,nan\n")
    assert found.stretches[0].first == Place(step=20)


def test_infinity_sign() -> None:
    found = scan("step,loss,best_loss\n10,0.5,∞\n20,−∞,∞\n".replace("−", "-"))
    assert values(found) == {"loss -inf"}
    assert scan("loss: ∞").n_bad == 1 and not scan("max_norm=∞, best: -∞").n_bad


def test_sentence_about_nan_with_commas_is_not_a_header() -> None:
    assert scan("WARNING: non-finite loss, ending training\n").n_bad == 1
