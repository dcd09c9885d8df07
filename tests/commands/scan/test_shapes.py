"""Lines that differ in digits alone are read once; each says its own place, name and count."""

from __future__ import annotations

import io
import random

import pytest

from fastguard.commands.scan.budget import Budget
from fastguard.commands.scan.found import LogScan
from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.scanner import scan_log
from fastguard.commands.scan.shapes import KEPT, Shapes, shortened
from fastguard.commands.scan.values import Value, nonfinite_values


def scan(text: str) -> LogScan:
    return scan_log(io.BytesIO(text.encode()))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The lines that are really read."""
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
    assert len(reads) <= 9  # the first line, and numbers that are padded with spaces
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
    bars = [f"[{i}/50] loss nan" for i in (48, 49, 50, 10, 11)]  # drawn anew
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
        assert max(len(shapes._known), len(shapes._meant), len(shapes._once)) <= KEPT + 1


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
