"""The end of a file is found from behind, whatever its bytes and the size of the blocks."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.commands.monitor.tail import BLOCK, Lines, start_of_last_lines, whole_lines_backwards

DATA = st.lists(st.sampled_from([b"\n", b"a", b"bc", b"\r", b"\x00"]), max_size=60).map(b"".join)
SIZES = st.integers(1, 9)


def in_file(data: bytes) -> int:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return os.dup(file.fileno())


@given(DATA, st.integers(1, 8), SIZES)
def test_the_last_lines_are_those_that_splitlines_gives(data: bytes, n: int, size: int) -> None:
    file = in_file(data)
    start, found = start_of_last_lines(file, len(data), n, size)
    os.close(file)
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    assert found == min(n, len(lines))
    assert data[start:].removesuffix(b"\n").split(b"\n")[: len(lines)] == lines[-n:]


@given(DATA, SIZES)
def test_blocks_backwards_lose_nothing_and_cut_no_line_that_fits(data: bytes, size: int) -> None:
    file = in_file(data)
    blocks = list(whole_lines_backwards(file, len(data), size))
    os.close(file)
    assert b"".join(reversed(blocks)) == data
    assert all(len(block) <= 2 * size for block in blocks)
    at = len(data)
    for block in blocks:
        at -= len(block)
        line_before = data[:at].rsplit(b"\n", 1)[-1]
        line_after = data[at:].split(b"\n", 1)[0]
        assert not line_before or len(line_before + line_after) >= size  # else it was cut in two


@given(DATA, st.lists(st.integers(1, 7)))
def test_lines_are_joined_however_they_come_in_pieces(data: bytes, sizes: list[int]) -> None:
    lines, found, at = Lines(), [], 0
    for size in [*sizes, len(data)]:
        found += lines.feed(data[at : at + size])
        at += size
    *whole, rest = data.split(b"\n")
    assert found == whole and lines.flush() == rest and lines.flush() == b""


@pytest.mark.parametrize("pieces", [1, 3], ids=["one-chunk", "three-chunks"])
def test_a_line_without_end_is_given_up_and_counted(pieces: int) -> None:
    lines = Lines()
    long = b"x" * (BLOCK + 3)
    step = -(-len(long) // pieces)
    for at in range(0, len(long), step):
        assert lines.feed(long[at : at + step]) == []
    assert lines.feed(b"more of it") == []
    assert lines.feed(b" and its end\nnext\n") == [b"next"]
    assert lines.overlong == 1
