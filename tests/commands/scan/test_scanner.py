"""Consecutive bad lines form stretches, and memory does not grow with the log."""

from __future__ import annotations

import io
import tracemalloc

from fastguard.commands.scan.findings import KEPT
from fastguard.commands.scan.found import NAMES
from fastguard.commands.scan.scanner import scan_log


def scan(*lines: str):
    return scan_log(io.BytesIO("\n".join(lines).encode()))


def test_consecutive_bad_lines_form_one_stretch() -> None:
    found = scan(
        "epoch 1 batch 1 loss 0.5",
        "epoch 1 batch 2 loss nan",
        "saving a checkpoint",
        "epoch 1 batch 3",
        "epoch 1 batch 3 loss inf",
        "epoch 1 batch 4 loss 0.5",
        "epoch 1 batch 5 loss nan",
        "epoch 2 batch 1 loss nan",
    )
    assert (found.n_lines, found.n_bad, found.n_stretches) == (8, 4, 3)
    first = found.stretches[0]
    assert (first.first_line, first.last_line, first.n_lines) == (2, 5, 2)
    assert (first.first.batch, first.last.batch) == (2, 3)
    assert first.excerpt == "epoch 1 batch 2 loss nan"
    assert [s.first.epoch for s in found.stretches] == [1, 1, 2]


def test_mentions_are_counted_separately() -> None:
    found = scan("loss 0.5", "checking for nan", "info nano", "loss 0.4, no nan found")
    assert (found.n_bad, found.n_mentions) == (0, 2)
    assert found.mention == (2, "checking for nan")


def test_empty_log() -> None:
    assert scan("").n_lines == 0 and scan("", "\r\r", " ").n_lines == 0


def test_the_number_of_stretches_is_bounded() -> None:
    lines = [f"epoch {i} loss_{i}=nan" for i in range(3 * KEPT)]
    found = scan_log(io.BytesIO("\n".join(lines).encode()), full=True)
    assert found.n_stretches == 3 * KEPT and len(found.stretches) == KEPT
    found = scan(*(f"loss_{i}=nan" for i in range(3 * NAMES)))
    assert len(found.stretches[0].values) == NAMES + 1
    assert found.stretches[0].values.total() == 3 * NAMES


class Repeated(io.RawIOBase):
    """A log of any size that is not stored anywhere."""

    def __init__(self, line: bytes, size: int) -> None:
        self.line, self.left = line, size

    def read(self, n: int = -1) -> bytes:
        n = min(n, self.left)
        self.left -= n
        return (self.line * (n // len(self.line) + 1))[:n]


def test_memory_does_not_grow_with_the_log() -> None:
    peaks = []
    for size in (3 << 20, 9 << 20):
        tracemalloc.start()
        bar = b"\r  3/100  2.1G  nan  nan  nan  34  640: 37% " + b"-" * 200 + b" 15/41"
        assert scan_log(Repeated(bar, size)).n_bad >= size // len(bar)  # type: ignore[arg-type]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_bad_line_without_a_place_inherits_the_previous_place() -> None:
    clean = [f"[{i}/100] loss 0.5" for i in range(1, 91)]
    found = scan("Epoch 7 of 10", *clean, "INFO saved", "info: lr 0.1", "loss nan")
    place = found.stretches[0].first
    assert (place.epoch, place.batch, place.batches) == (7, 90, 100)
    found = scan("Epoch 7, batch 3", "Epoch 8", "loss nan")
    assert (found.stretches[0].first.epoch, found.stretches[0].first.batch) == (8, None)


def test_excerpt_of_a_mention_contains_the_word() -> None:
    long = " | ".join(f"column {i}: 0.{i}" for i in range(60))
    found = scan(f"{long} | number of nan iterations: 0 | {long}")
    assert found.mention is not None and len(found.mention.text) <= 210
    assert "number of nan iterations" in found.mention.text
    assert found.mention.text.startswith("...") and found.mention.text.endswith("...")
