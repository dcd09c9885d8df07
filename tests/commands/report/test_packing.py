"""Packed bytes are unchanged after decoding, in Python here and in a browser."""

import lzma
import random
from pathlib import Path

import pytest

from fastguard.commands.report import packing
from guardtest.browser import chromium

RNG = random.Random(0)
DATA = {
    "empty": b"",
    "one byte": b"\0",
    "zeros": bytes(70_000),
    "all bytes": bytes(range(256)),
    "noise": RNG.randbytes(5_000),
    "words": b" ".join(RNG.choices([b"scatter", b"heatmap", b"axis", b"\xff"], k=9_000)),
    "far apart": (far := RNG.randbytes(20_000)) + RNG.randbytes(90_000) + far,
}
SCRIPT = Path(packing.__file__).with_name("unpack.js").read_text("utf-8")
DIGITS = [chr(code) for code in range(33, 127) if chr(code) not in "<>&"]


def lzma_file(text: str) -> bytes:
    numbers = [
        91 * DIGITS.index(a) + DIGITS.index(b) for a, b in zip(*[iter(text)] * 2, strict=True)
    ]
    bits = "".join(f"{number:013b}" for number in numbers)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits) - 7, 8))


@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_packed_bytes_are_an_lzma_file_in_base_91(data):
    text = packing.pack(data)
    assert text.isascii() and text.isprintable() and not set(text) & set("<>& ")
    assert lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(lzma_file(text)) == data


def test_the_browser_decodes_the_same_bytes(tmp_path):
    decoded = f"{SCRIPT}\nreturn Array.from(fromLzma(fromBase91(arguments[0]), arguments[1]))"
    with chromium(tmp_path) as browser:
        for name, data in DATA.items():
            found = browser.execute_script(decoded, packing.pack(data), len(data))
            assert bytes(found) == data, name
