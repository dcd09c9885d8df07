"""Recognizes NaN and Inf as programs print them: "nan", "-inf", "1.#QNAN", ".nan".

Parts of other words, as in "nano", "INFO" and "nan.py", do not match.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Scripts without spaces between words. Their characters may be adjacent to a NaN or Inf.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
# Matches NaN and Inf as printed by Python, numpy, C and JavaScript, with the zeros that Lightning
# appends ("nan.0"). YAML writes .nan and -.inf, and Microsoft's older C library writes 1.#QNAN,
# -1.#IND and 1.#INF. "NaN/Inf" is a word and does not match.
NONFINITE = (
    rf"(?<![a-zA-Z]/)(?:(?<![\w.#@\\-])|(?<=\.\.)|(?<=[{_CJK}]))[+-]?(?:(?<![*/])\.)?"
    r"(?:(?:nan(?!/inf)|inf(?:inity)?(?!/nan))(?:\.0*)?"
    rf"(?:(?!\.?[\w-]|/[a-z])|(?=[{_CJK}])|(?=/(?:nan|inf)\b))"
    r"|1\.#(?:[qs]?nan|ind|inf)\d*)"
)
TOKEN = re.compile(NONFINITE, re.IGNORECASE)
NUMBER = r"[+-]?(?:\d[\w.+%-]*|\.\d+|nan|inf(?:inity)?)(?![\w%])"
_NEXT = (
    r"(?:\s*[,;/]\s*|\s+)[+-]?(?:\.?(?:nan|inf(?:inity)?)(?:\.0*)?(?!\.?[\w-]|/[a-z])"
    r"|(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?![\w:/%]))"
)
# An array or a row of a table is one match, of any length.
RUN = re.compile(rf"{NONFINITE}(?:{_NEXT})*+", re.IGNORECASE)


def first_nonfinite(text: str) -> int:
    """The offset of the first NaN or Inf; 0 if there is none."""
    token = TOKEN.search(text)
    return token.start() if token else 0


def runs(text: str) -> Iterator[re.Match[str]]:
    """Yields each NaN or Inf, together with the array that it begins.

    `find` locates candidates first. A pattern that begins with a lookbehind is tried at every
    character, which takes ten times as long.
    """
    lower = text.lower()
    if len(lower) != len(text):  # some letters are longer in lower case
        yield from RUN.finditer(text)
        return
    end = 0
    nexts = dict.fromkeys(("nan", "inf", "1.#"), 0)
    while True:
        for word, at in nexts.items():
            if 0 <= at < end or at == 0:
                nexts[word] = lower.find(word, end)
        at = min((at for at in nexts.values() if at >= 0), default=-1)
        if at < 0:
            return
        start = at
        for before in (".", "+-"):
            start -= start > end and text[start - 1] in before
        run = RUN.match(text, start)
        end = at + 1
        if run is not None:
            end = run.end()
            yield run


def may_have(lower: str) -> bool:
    """Fast check that never misses a NaN or Inf, but may also accept other text."""
    return (
        _has_word_end(lower, "nan")
        or _has_word_end(lower, "inf")
        or "infinity" in lower
        or "1.#" in lower
        or "finite" in lower
        or "not a number" in lower
        or "invalid loss" in lower
        or "invalid value encountered" in lower
        or "loss scale" in lower
    )


def _has_word_end(text: str, end: str) -> bool:
    at = text.find(end)
    while at >= 0:
        after = text[at + len(end) : at + len(end) + 1]
        if not ("a" <= after <= "z") or (after == "s" and not text[at + 4 : at + 5].isalpha()):
            return True
        at = text.find(end, at + 1)
    return False


def canonical(token: str) -> str:
    """Normalizes a token to `"nan"`, `"inf"` or `"-inf"`."""
    if "n" in token.lower().replace("inf", "").replace("inity", ""):  # as in nan, qnan and ind
        return "nan"
    return "-inf" if token.startswith("-") else "inf"
