"""Lines that differ only in meaningless words are parsed once, with the same results."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest

from fastguard.commands.scan.budget import Budget
from fastguard.commands.scan.scanner import scan_log
from fastguard.commands.scan.shapes import Shapes
from fastguard.commands.scan.values import Value
from fastguard.commands.scan.wording import Wording, Wordings

PROSE = Path(__file__).parents[3] / "README.md"
WORDS = sorted({*re.findall(r"[A-Za-z_]+", PROSE.read_text())})
FORMS = [
    "{} {} loss nan",
    "step 12 {} {}: {} loss: nan {} lr 1e-4",
    "{}={} {}: nan",
    "[{}] epoch 3 {}/{} norm -> inf ({})",
    "{}: tensor([nan, 0.5, inf], device='cuda:0') {}",
    "gradient of {} is non-finite, {} infinite",
    "found nan in {} of {}.{} at step 17",
    "{} {} checking {} for nan values",
    "12:00:01 {} INF {} {} took inf {}",
    "{{'loss': nan, '{}': 0.5, '{}': inf, 'epoch': 3.5}}",
    "Epoch 3: 37%|##  | 15/41 [00:01<00:02, 12.3it/s, {}_loss=nan.0, {}={}]",
    "{}Error: {} returned nan values in its 0th output; {}",
    "{} mean {} after {} steps was nan; {} {}",
    "{}.{}({}=nan, {}) {}: 3, {} nan {}",
    "nan {} {} {}",
    "{} loss 0.5 {} acc {} 0.25",
]


@pytest.mark.parametrize("form", FORMS)
def test_result_equals_that_of_parsing_the_line_itself(form: str) -> None:
    rng = random.Random(form)
    shapes = Shapes(Budget())
    for _ in range(300):
        line = re.sub(r"{}", lambda _: rng.choice(WORDS), form)
        line = line.replace("{{", "{").replace("}}", "}").encode()
        alone = Shapes(Budget())
        alone._wording.of = lambda line: Wording(line, [])  # type: ignore[method-assign]
        assert shapes.of(line) == alone.of(line), line


def test_lines_with_new_words_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[bytes] = []
    read = Shapes._read
    monkeypatch.setattr(Shapes, "_read", lambda self, line: reads.append(line) or read(self, line))
    letters = "dgjkvwz"  # no word of the grammar consists of these
    rng = random.Random(5)

    def word() -> str:
        return "".join(rng.choices(letters, k=7))

    name = f"{word()} {word()}_norm"
    log = f"{word()} step 0 {name} nan\n"
    log += "".join(f"{word()} step {i} {word()} {word()}_norm nan\n" for i in range(1, 2000))
    found = scan_log(io.BytesIO(log.encode()))
    assert found.n_bad == 2000 and found.stretches[0].last.step == 1999
    assert next(iter(found.stretches[0].values)) == Value(name, "nan")
    assert len(reads) < 10  # step 0 to step 1000


def test_words_and_offsets_of_a_wording() -> None:
    line = b"Zebra ZEBRA zebra zooming loss_2 nan at giraffe 17"
    wording = Wordings().of(line)
    assert wording.words == [b"Zebra", b"ZEBRA", b"zebra", b"zooming", b"giraffe"]
    assert b"loss_2 nan at" in wording.line
    assert wording.name(wording.line.decode()) == line.decode()
    for number in (b"2", b"17"):
        begin, end = wording.line.index(number), wording.line.index(number) + len(number)
        begin, end = wording.span((begin, end))
        assert line[begin:end] == number
