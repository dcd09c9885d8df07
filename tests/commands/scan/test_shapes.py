"""Lines that differ only in digits are parsed once; each keeps its own place, name and count."""

from __future__ import annotations

import io
import random

import pytest

from fastguard.commands.scan import text
from fastguard.commands.scan.budget import Budget
from fastguard.commands.scan.found import LogScan, Run
from fastguard.commands.scan.output import as_dict
from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.scanner import scan_log
from fastguard.commands.scan.shapes import KEPT, Shapes, shortened
from fastguard.commands.scan.values import Value, nonfinite_values


def scan(text: str) -> LogScan:
    return scan_log(io.BytesIO(text.encode()))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The lines that are parsed."""
    lines: list[bytes] = []
    read = Shapes._read

    def counted(self: Shapes, line: bytes):
        lines.append(line)
        return read(self, line)

    monkeypatch.setattr(Shapes, "_read", counted)
    return lines


@pytest.mark.parametrize(
    "form",
    [
        "epoch {e} step {i:06d} loss nan lr 1e-4\n",
        "epoch {e} step {i:06d} grads [" + "nan " * 500 + "]\n",
        "训练次数：{i:06d}, 损失：nan\n",
        "\rEpoch 3:  37%|███▋  | {i:06d}/41163 [00:01<00:02, 12.30it/s, train_loss=nan.0]",
        " iteration {i:6d}/ 100000 | lm loss: 1.5 | number of nan iterations:   1 |\n",
    ],
)
def test_each_shape_is_parsed_once(form: str, reads: list[bytes]) -> None:
    found = scan("loss 0.5\n" + "".join(form.format(e=i // 1000, i=i) for i in range(1, 2501)))
    assert found.n_bad == 2500
    assert len(reads) <= 9  # the first line, and lines with numbers that are padded with spaces
    last = found.stretches[-1].last
    assert 2500 in (last.step, last.batch) or form.startswith("训")


def test_digits_in_names_and_counts_distinguish_lines() -> None:
    found = scan("".join(f"loss_{i % 3}=nan step {i}\n" for i in range(30)))
    assert {value: n for value, n in found.stretches[0].values.items()} == {
        Value(f"loss_{i}", "nan"): 10 for i in range(3)
    }
    found = scan("".join(f"number of nan iterations: {i % 2}\n" for i in range(20)))
    assert (found.n_bad, found.n_mentions) == (10, 10)
    found = scan("found 0 nan values in grads\nfound 5 nan values in grads\n")
    assert (found.n_bad, found.n_mentions) == (1, 1)


def test_cached_shapes_give_the_same_counts() -> None:
    bars = [f"[{i}/50] loss nan" for i in (48, 49, 50, 10, 11)]  # the bar is drawn again
    (stretch,) = scan("\n".join(["Epoch 3", *bars])).stretches
    assert (stretch.n_lines, stretch.first_line, stretch.last_line) == (5, 2, 6)
    assert stretch.first == Place(3, None, 48, 50) and stretch.last == Place(3, None, 50, 50)
    epochs = scan("".join(f"epoch {i // 4} step {i} loss nan\n" for i in range(12)))
    assert [(s.first.epoch, s.n_lines) for s in epochs.stretches] == [(0, 4), (1, 4), (2, 4)]
    assert [s.last.step for s in epochs.stretches] == [3, 7, 11]


def test_shape_cache_is_bounded() -> None:
    shapes = Shapes(Budget())
    for i in range(3 * KEPT):
        shapes.of(("a" * (i % 1000) + f" loss{i} nan" + "b" * (i // 1000)).encode())
        caches = [*vars(shapes._lines).values(), *vars(shapes._wordings).values(), shapes._once]
        assert max(map(len, caches)) <= KEPT + 1


def test_shortened_array_has_the_same_values() -> None:
    rng = random.Random(5)
    cells = ["nan", "inf", "-inf", "NaN", "0.5", "-1.25", "3.", "1e-05", "12"]
    heads = ["", "[", "  [[", "step 3 grads [", "tensor([", "loss: ", "epoch 3: loss ", "1, 2 | "]
    shorter = 0
    for _ in range(3000):
        text = rng.choice([", ", " ", ","]).join(rng.choices(cells, k=rng.randint(1, 12)))
        line = (rng.choice(heads) + text + rng.choice(["", "]", "]])", "],", " "])).encode()
        short, same = shortened(line)
        assert short[:same] == line[:same]
        shorter += len(short) < len(line)
        read, read_short = (nonfinite_values(each.decode())[0] for each in (line, short))
        assert set(read) == set(read_short), (line, short)
    assert shorter > 1500


@pytest.mark.parametrize(
    "line", [b"loss=nan]", b"tensor(-inf)", b"loss 0.5", b"nan", b"x: inf, y: 3"]
)
def test_lines_without_an_array_are_not_shortened(line: bytes) -> None:
    assert shortened(line) == (line, len(line))


FORMS = [
    "step {i} loss nan",
    "epoch {e} batch {i} loss nan {j}",
    "epoch {e}.{j} loss inf",
    "loss_{e} nan at {i}",
    "nan iterations: {e}",
    "\r {p}%|##  | {i}/900 [00:01<00:02, 1{j}it/s, loss=nan]",
    "[{i}/900] loss: nan",
    "{{'loss': nan, 'epoch': {e}.{j}}}",
    "g {i} [nan, 0.{i}, inf]",
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_lines_read_together_give_the_results_of_single_lines(end: str, monkeypatch) -> None:
    rng = random.Random(5)
    logs = []
    for _ in range(60):
        lines = []
        for form in rng.choices(FORMS, k=6):
            i, e = rng.randint(0, 3000), rng.randint(0, 12)
            for _ in range(rng.choice([3, 20, 60, 200])):
                i, e = max(0, i + rng.choice([1, 1, 1, 7, -3])), e + (rng.random() < 0.01)
                lines.append(form.format(i=i, e=e, j=rng.randint(0, 9), p=i % 90 + 10))
        logs.append(end.join([*lines, ""]).encode())
    together = [as_dict("", scan_log(io.BytesIO(log))) for log in logs]
    monkeypatch.setattr(text, "MIN_BATCH", 1)
    monkeypatch.setattr(text, "MAX_BATCH", 1)
    assert together == [as_dict("", scan_log(io.BytesIO(log))) for log in logs]


def test_lines_that_differ_in_digits_are_not_looked_up(monkeypatch) -> None:
    looked = []
    of, extend = Shapes.of, Run.extend
    monkeypatch.setattr(Shapes, "of", lambda *given: looked.append(1) or of(*given))
    monkeypatch.setattr(Run, "extend", lambda *given: looked.append(1) or extend(*given))
    log = "".join(f"step {i} loss nan\n" for i in range(10_000, 60_000))
    found = scan_log(io.BytesIO(log.encode()))
    assert found.n_bad == 50_000 and found.stretches[0].last.step == 59_999
    assert len(looked) < 2000
