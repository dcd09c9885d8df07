"""The time of a scan is bounded for any content, and lines that were not analyzed are reported."""

from __future__ import annotations

import io
import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import pytest

from fastguard.commands.cli import main
from fastguard.commands.scan import budget, json_lines
from fastguard.commands.scan.budget import Counted, n_lines, words_at
from fastguard.commands.scan.findings import Findings
from fastguard.commands.scan.json_lines import JsonLines
from fastguard.commands.scan.lines import Line
from fastguard.commands.scan.scanner import scan_log
from fastguard.commands.scan.shapes import Shapes
from fastguard.commands.scan.table import Table

rng = random.Random(3)

Lines = Callable[[int], str]


def word(n: int = 6) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=n))


def text(form: str) -> Lines:
    """Lines whose words never repeat."""
    return lambda i: form.format(i=i, a=word(), b=word(4), c=word(8))


def values(name: str) -> Lines:
    return lambda i: (
        f"{i // 1000},{i},nan,{word()} nan {word()}" if i else f"epoch,step,loss,{name}"
    )


KINDS: dict[str, Lines] = {
    "names": text("{a} {b} loss nan"),
    "keys": text("{a}={b} {c}: nan"),
    "mentions": text("checking {a} for nan values in {b}"),
    "level": text("[12:00:01 INF] {a} {b} {c}"),
    "sentences": text("gradient of {a} is non-finite, {b} infinite"),
    "arrays": text("{a}: tensor([nan, 0.5, inf], device='cuda:0') {b}"),
    "alternating": lambda i: f"{word()} loss {'nan' if i % 2 else '0.5'}",
    "epochs": text("epoch {i} {a} loss nan"),
    "dicts": text("{{'loss': nan, '{a}': 0.5, 'epoch': {i}}}"),
    "no_json": text('{{"{a}" {b}: nan'),
    "json_keys": text('{{"step": {i}, "{a}": NaN, "{b}": 0.5}}'),
    "json_text": text('{{"log": "epoch {i} {a} loss nan", "stream": "stdout"}}'),
    "json_mixed": lambda i: json.dumps({"step": i, "loss": [float("nan"), "nan", 0.5, [1]][i % 4]}),
    "json_rows": lambda i: json.dumps({"step": i, "loss": float("nan") if i % 3 else 0.5}),
    "csv_rows": lambda i: f"{i},{'nan' if i % 3 else 0.5}" if i else "step,loss",
    "csv_odd": values("note"),
    "heads": text("epoch,loss,{a},{b}"),
}


def log(lines: Lines, size: int) -> bytes:
    parts: list[str] = []
    n = 0
    while n < size:
        parts.append(lines(len(parts)) + "\n")
        n += len(parts[-1])
    return "".join(parts).encode()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records a name for each call of a method that processes one line, row or object."""
    seen: list[str] = []

    def count(owner: object, method: str) -> None:
        real = getattr(owner, method)

        def counted(*given, **named):
            seen.append(method)
            return real(*given, **named)

        monkeypatch.setattr(owner, method, counted)

    count(Shapes, "_read")
    count(Table, "read")
    count(JsonLines, "read")
    count(Findings, "bad")
    count(json_lines, "parse")
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_work_per_byte_is_bounded(kind: str, looks: list[str], monkeypatch) -> None:
    monkeypatch.setattr(budget, "FIRST", 20_000)
    found = scan_log(io.BytesIO(log(KINDS[kind], 2 << 20)))
    counted = found.counted
    assert counted.n_lines > 0.5 * found.n_lines > 4_000
    # The budget of 2 MiB is 16,384 units, and 4096 rows are read at once.
    assert len(looks) < 10_000


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("mentions", "level", "csv_odd", "heads")]
)
def test_limited_and_full_scans_agree_on_the_first_finding(kind: str, monkeypatch) -> None:
    data = log(KINDS[kind], 40_000)
    full = scan_log(io.BytesIO(data), full=True)
    monkeypatch.setattr(budget, "FIRST", 2000)
    found = scan_log(io.BytesIO(data))
    assert found.counted.n_lines and not full.counted.n_lines
    assert found.n_lines == full.n_lines
    assert 0 < found.n_bad <= full.n_bad <= found.n_bad + found.counted.n_nonfinite
    for one, other in zip(found.stretches[:1], full.stretches[:1], strict=True):
        assert (one.first_line, one.first, one.excerpt) == (
            other.first_line,
            other.first,
            other.excerpt,
        )


@pytest.mark.parametrize(
    "line",
    ["epoch 7 batch 3 loss nan", "epoch 7 batch 3 loss: nan", "epoch 7 batch 3 grad_norm=inf"],
)
@pytest.mark.parametrize("kind", ["mentions", "level"])
def test_a_value_after_thousands_of_mentions_is_found(kind: str, line: str, monkeypatch) -> None:
    monkeypatch.setattr(budget, "FIRST", 2000)
    before = log(KINDS[kind], 2 << 20)
    found = scan_log(io.BytesIO(before + line.encode() + b"\n" + log(KINDS[kind], 100_000)))
    assert found.counted.n_lines > 5_000
    assert found.n_bad == 1
    (stretch,) = found.stretches
    assert stretch.first_line == before.count(b"\n") + 1
    assert (stretch.first.epoch, stretch.first.batch) == (7, 3)
    assert stretch.excerpt == line


def test_ordinary_logs_of_any_size_are_fully_analysed(monkeypatch) -> None:
    monkeypatch.setattr(budget, "FIRST", 20_000)
    for form in (
        "epoch 3 step {i} loss nan lr 1e-4 grad_norm nan",
        "epoch 3 step {i} loss 0.5 lr 1e-4 grad_norm 1.5",
        '{{"epoch": 3, "step": {i}, "loss": 0.5}}',
        "{i},0.5",
        "\r  3/100  2.1G  nan  nan  nan  34  640: 37% ------------- {i}/99999",
    ):
        lines = text(form)
        data = log(lambda i, lines=lines: lines(i) if i else "step,loss", 2 << 20)
        found = scan_log(io.BytesIO(data))
        assert not found.counted.n_lines, form
        assert found.n_bad == (found.n_lines - 1 if "nan" in form else 0)


@pytest.mark.parametrize("line", ["nan", "loss nan", "loss: inf", "tensor(nan)"])
def test_short_lines_that_repeat_are_fully_analyzed(line: str, monkeypatch) -> None:
    monkeypatch.setattr(budget, "FIRST", 20_000)
    found = scan_log(io.BytesIO(f"{line}\n".encode() * 300_000))
    assert found.n_bad == 300_000 and not found.counted.n_lines


def test_analysis_resumes_once_lines_repeat(monkeypatch) -> None:
    monkeypatch.setattr(budget, "FIRST", 2000)
    odd = log(KINDS["names"], 2 << 20)
    good = log(text("epoch 8 step {i} loss 0.5"), 3 << 20)
    found = scan_log(io.BytesIO(odd + good + b"epoch 9 step 5 loss nan\n"))
    last = found.stretches[-1]
    assert (last.first.epoch, last.first.step, last.n_lines) == (9, 5, 1)
    assert found.counted.last_line <= (odd + good[: 1 << 20]).count(b"\n")


def test_documents_are_read_within_the_budget(monkeypatch, looks: list[str]) -> None:
    monkeypatch.setattr(budget, "FIRST", 2000)
    rows = [{"step": i, word(): float("nan"), "loss": 0.5} for i in range(20_000)]
    data = ("[" + ",\n".join(map(json.dumps, rows)) + "]").encode()
    found = scan_log(io.BytesIO(data))
    assert len(looks) < 3000
    assert found.stretches[0].first.step == 0 and found.stretches[0].first_line == 1
    assert found.counted.last_line == 20_000
    assert found.n_lines == 20_000 and found.n_bad + found.counted.n_nonfinite == 20_000


def test_output_reports_lines_that_were_only_counted(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(budget, "FIRST", 2000)
    path = tmp_path / "odd.log"
    path.write_bytes(log(KINDS["names"], 1 << 19))
    n = path.read_bytes().count(b"\n")
    assert main(["scan", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"NaN or Inf in at least {scan_log(path.open('rb')).n_bad:,} of {n:,} lines" in out
    assert "to bound the time" in out and f"to {n:,} were only searched" in out
    assert "--full analyzes all" in out
    assert main(["scan", "--json", str(path)]) == 1
    (said,) = json.loads(capsys.readouterr().out)
    counted = said["only_counted"]
    assert said["bad_lines"] + counted["with_nonfinite"] == n == counted["last_line"]
    assert counted["lines"] == counted["with_nonfinite"]
    assert main(["scan", "--full", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"NaN or Inf in {n:,} of {n:,} lines" in out and "only searched" not in out


def test_counted_lines_with_the_words_give_exit_status_2(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    path = tmp_path / "odd.log"
    path.write_bytes(log(KINDS["mentions"], 1 << 17))
    assert main(["scan", str(path)]) == 0
    monkeypatch.setattr(budget, "FIRST", 2000)
    capsys.readouterr()
    assert main(["scan", str(path)]) == 2
    assert "--full analyzes all" in capsys.readouterr().out
    assert main(["scan", "--full", str(path)]) == 0
    path.write_bytes(log(text("epoch,loss,{a},{b}"), 1 << 17))
    capsys.readouterr()
    assert main(["scan", str(path)]) == 0  # the file was searched, and contains no NaN
    assert "none contains NaN or Inf" in capsys.readouterr().out


def test_line_count_excludes_blank_lines() -> None:
    for _ in range(3000):
        lines = "".join(rng.choices(" \n\na\tb", k=rng.randint(0, 9))).encode()
        assert n_lines(lines) == sum(bool(line.strip()) for line in lines.split(b"\n"))


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("loss nan", True),
        ("loss=-inf", True),
        ("[inf, 3]", True),
        ("nan.0", True),
        ("cost 1.#QNAN", True),
        ("infinity", True),
        ("is infinite", True),
        ("non-finite", True),
        ("损失：nan", True),
        ("info", False),
        ("nano banana", False),
        ("information", False),
        ("loss is finite", False),
        ("loss_nan_count", False),
    ],
)
def test_lines_that_are_only_counted(line: str, has: bool) -> None:
    counted = Counted()
    counted.add(3, f"start\n{line}\n{line} {line}\nend".encode(), 6)
    assert counted.n_nonfinite == 2 * has
    assert counted.first == (Line(4, line) if has else None)


def test_words_are_found_at_both_ends_of_a_text() -> None:
    for text, at in {
        b"nan": [0],
        b"inf nan": [0, 4],
        b"nano": [],
        b"": [],
        b"xnan\ninf": [5],
    }.items():
        assert words_at(text).tolist() == at
