"""Splitting logs of any encoding and size into clean lines."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.commands.scan import lines
from fastguard.commands.scan.foreign import NotTextError
from fastguard.commands.scan.lines import LONGEST, Line, read_blocks
from fastguard.commands.scan.scanner import scan_log

LOG = b"epoch 1 loss nan\n" * 50


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """Yields the lines of a log without blank lines. Carriage returns also end a line."""
    for number, data in read_blocks(file):
        for i, line in enumerate(data.split(b"\n")):
            for drawn in line.split(b"\r"):
                if drawn and not drawn.isspace():
                    yield Line(number + i, drawn.decode(errors="replace"))


def texts(data: bytes) -> list[str]:
    return [line.text for line in read_lines(io.BytesIO(data))]


def test_only_line_feeds_increase_the_line_number() -> None:
    found = list(read_lines(io.BytesIO(b"a\r\n\n b\rc\r\x1b[Kd\ne")))
    assert found == [(1, "a"), (3, " b"), (3, "c"), (3, "d"), (4, "e")]


def test_control_sequences_are_removed() -> None:
    assert texts(b"\x1b[31mloss\x1b[0m \x1b[2K\x1b[1A\x1b]0;title\x07nan\x1b[?25l") == ["loss nan"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(encoding: str) -> None:
    assert texts("37%|███▋ loss nan\r\nnext".encode(encoding)) == ["37%|███▋ loss nan", "next"]


def test_full_width_letters_digits_and_signs_are_read_as_ascii() -> None:
    line = "损失：ＮａＮ，ｌｒ＝０．１；－Ｉｎｆ"
    assert texts(line.encode()) == ["损失：NaN，lr＝0.1；-Inf"]
    assert texts(line.encode() + b"\xff") == [(line.encode() + b"\xff").decode(errors="replace")]
    (stretch,) = scan_log(io.BytesIO("epoch 3 ｌｏｓｓ：ＮａＮ\nｉｎｆｏ：ok\n".encode())).stretches
    assert [(value.name, value.text) for value in stretch.values] == [("loss", "nan")]
    assert stretch.n_lines == 1


def test_invalid_utf8_is_accepted() -> None:
    assert texts(b"\xff\xfeloss nan"[1:]) == ["�loss nan"]
    assert texts(bytes(range(128, 256)))


@pytest.mark.parametrize(
    "data, what",
    [
        (lzma.compress(LOG), "xz; unpack it first: xz -dc FILE | fastguard scan -"),
        (bz2.compress(LOG), "bzip2"),
        (b"\x28\xb5\x2f\xfd" + LOG, "zstd"),
        (b"PK\x03\x04" + LOG, "zip archive"),
        (gzip.compress(lzma.compress(LOG)), "xz"),
        (bytes(range(256)) * 10, "not text, but binary data"),
        ("loss nan\n".encode("utf-16-le") * 10, "UTF-16"),
        (b"\x18\0\0\0\0\0\0\0\xa3\x7fK\x22\t\0\0\xc0\xa3\x01\x1a\rbrain.Event:2", "TensorBoard"),
    ],
    ids=["xz", "bzip2", "zstd", "zip", "xz-in-gzip", "random", "utf-16-without-mark", "events"],
)
def test_binary_formats_are_identified(data: bytes, what: str) -> None:
    with pytest.raises(NotTextError, match=re.escape(what)):
        texts(data)


@pytest.mark.parametrize(
    "data",
    [
        LOG + bytes(100_000) + LOG,
        bytes(1000) + LOG,
        LOG[:200] + bytes(700) + LOG[:200],
        "训练 损失 nan\n".encode("gbk") * 100,
        "loss nan é\n".encode("latin-1") * 100,
        b"\x00\x01 loss nan",
        "loss nan\n".encode("utf-16") * 10,
    ],
    ids=["zeros", "zeros-first", "part-of-a-block", "gbk", "latin-1", "short", "utf-16"],
)
def test_text_of_any_encoding_is_read(data: bytes) -> None:
    assert any("nan" in text for text in texts(data))


def test_gzip_is_detected_and_truncation_raises() -> None:
    packed = gzip.compress(b"loss nan\n" * 1000)
    assert texts(packed) == ["loss nan"] * 1000
    with pytest.raises(EOFError):
        texts(packed[:-20])


def test_endless_progress_bar_is_streamed() -> None:
    class Endless(io.RawIOBase):
        """A progress bar without end; counts the bytes that were read."""

        taken = 0

        def read(self, n: int = -1) -> bytes:
            self.taken += n
            return b"\r 37%| 15/41 loss=nan" * (n // 22)

    file = Endless()
    found = read_lines(file)  # type: ignore[arg-type]
    for _ in range(100_000):  # more than one chunk
        assert next(found) == (1, " 37%| 15/41 loss=nan")
    assert file.taken <= 4 * lines.CHUNK


def test_very_long_lines_are_split_at_spaces() -> None:
    data = b"x" * (LONGEST - 10) + b" loss nan " + b"y" * 100
    found = texts(data)
    assert "".join(found) == data.decode() and len(found) == 2
    assert any("loss nan" in text for text in found)
    assert max(map(len, texts(b"z" * (5 << 20)))) <= LONGEST + lines.CHUNK


@given(
    st.lists(st.sampled_from(["a", "b c", "\r", "\n", "\r\n", "é", "\x1b[1m"])), st.integers(1, 9)
)
def test_chunk_size_does_not_change_the_lines(parts: list[str], size: int) -> None:
    data = "".join(parts).encode()

    class Slow(io.BytesIO):
        """Returns a few bytes at a time, as a pipe does."""

        def read(self, n: int | None = -1) -> bytes:
            return super().read(min(size, n or size) if n != -1 else size)

    whole = list(read_lines(io.BytesIO(data)))
    assert [line.text for line in read_lines(Slow(data))] == [line.text for line in whole]
    numbers = [line.number for line in whole]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1251", "gbk", "shift-jis", "utf-16"])
@pytest.mark.parametrize("before", ["", "é", "损失", "потери", "誤差"])
def test_place_is_found_in_any_encoding(encoding: str, before: str) -> None:
    text = f"{before} epoch 12 step 345 loss nan {before}\n" * 3
    found = scan_log(io.BytesIO(text.encode(encoding, errors="replace")))
    (stretch,) = found.stretches
    assert found.n_bad == 3 and (stretch.first.epoch, stretch.last.step) == (12, 345)
