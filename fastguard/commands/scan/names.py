"""Finds the name of a value in the text before it: the nearest metric in its clause.

In "Disc Loss: 3.88, Dur Loss: nan", the name is "Dur Loss"; in "Cost after iteration 100: nan", it
is "Cost".
"""

from __future__ import annotations

import re
from unicodedata import category

from fastguard.commands.scan.spellings import TOKEN
from fastguard.commands.scan.vocabulary import LEVEL, is_metric

LETTER = re.compile(r"[^\W\d_]")
_DIGIT = re.compile(r"\d")
CLAUSE = re.compile(r"[,;，；、|｜│┃║\[\]{}<>!?]|\.\s|[:=：＝]|\s-{1,2}\s|\(")
"""Beginning of a clause, across which the name of a value does not extend."""

_BESIDE = re.compile(r"\s(?:before|after|pre|post)[ -]?clip(?:ping)?$", re.IGNORECASE)
_MARKUP = re.compile(r"<([^<>]*)>$")
_INDEX = re.compile(  # as in "loss[3]: nan" and "loss [epoch 3/10] -> nan"
    r"(?:\s?\[[\w,. ]{0,20}(?:/[\w ]{1,10})?\]|\]|(?<=\w)\{[^{}]{0,80}\}"
    r"|\s?【[^】]{0,40}】|\s?[(（](?=[^()（）]{0,60}[\d ])[^()（）]{0,60}[)）])+$"
)
_FILE = re.compile(r".*\.(?:ckpt|pt|pth|bin|safetensors|h5|pkl|npz|py)", re.IGNORECASE)
PLACES = frozenset(
    "after at in on for of from during over until by per this that "
    "the a an each every epoch epochs ep step steps iter iters iteration iterations it "
    "and batch batches minibatch update updates round rounds # @ no number t samples sample "
    "examples images tokens episode episodes last so far now".split()
)
_STOPS = PLACES | frozenset(
    "is was are were be been and or with to our your its current has have had got getting "
    "new which while then than as skip skipping monitored metric total: nan inf "
    "non-finite nonfinite".split()
)
# double bars of a norm, and mathematical operators such as nabla
_SYMBOL = re.compile(r"[\u2016\u2200-\u22ff]")
_WORDS = re.compile(r"[^\s\"`*\]]+")


def name_in(stem: str, *, separated: bool) -> str | None:
    """The name at the end of a text: the nearest metric in its last clause, or its last word."""
    stem, begin = _last_clause(stem)
    words = [bare for word in _WORDS.findall(stem[begin:]) if (bare := word.strip("'"))]
    if not words:
        return None
    if separated and begin and LETTER.search(stem[begin:]) and all(map(_is_place, words)):
        before = stem[:begin].rstrip(",;| ")  # val loss, epoch 3: nan
        name = None if before[-1:].isdigit() else name_in(before, separated=True)
        return name if name and is_metric(name) else None
    at = next(
        (i for i in reversed(range(len(words))) if _is_name(words[i]) and is_metric(words[i])), -1
    )
    if at < 0:
        last = words[-1].strip("#")
        return _balanced(last) if _is_name(last) and separated else None
    rest = words[at + 1 :]
    if all(_is_place(word) or word.lower() in _STOPS for word in rest):
        end = at
    elif separated and rest[0].lower() in PLACES and any(map(_DIGIT.match, rest)):
        end = at  # as in "after 3 epochs of warmup"
    elif separated and len(rest) <= 9 and _DIGIT.match(rest[-1].strip("()#")):
        end = at  # the place is in unknown words or another language
    elif not words[-1].isascii() and len(rest) <= 6:
        end = at  # a place and a verb in another language
    elif len(rest) <= 2 and all(word.isalpha() or _is_parenthesis(word) for word in rest):
        end = len(words) - 1
    elif separated and _is_name(words[-1]):
        return _balanced(words[-1])
    else:
        return None
    begin = at
    while begin > 0 and at - begin < 3 and _is_attribute(words[begin - 1]):
        begin -= 1
    return _balanced(" ".join(words[begin : end + 1]))


def _balanced(name: str) -> str:
    """Removes unmatched parentheses and pictographs from a name."""
    while name and category(name[0]) == "So":
        name = name[1:].lstrip()
    while name and category(name[-1]) == "So":
        name = name[:-1].rstrip()
    if name.count("(") == name.count(")"):
        return name
    return name.partition("(")[0].strip() or name.strip("()")


def _last_clause(stem: str) -> tuple[str, int]:
    """The text without indices at its end, and where its last clause begins.

    A closed parenthesis belongs to the clause.
    """
    stem = _INDEX.sub("", stem.rstrip(" \t\"'`*"))
    stem = _BESIDE.sub("", _MARKUP.sub(r"\1", stem))
    begin = max((token.end() for token in TOKEN.finditer(stem)), default=0)
    depth = stem.count(")")
    for mark in CLAUSE.finditer(stem):
        if mark[0] == "(" and ")" in stem[mark.end() :] and depth:
            continue
        begin = max(begin, mark.end())
    return stem.rstrip(".…"), begin


def _is_name(word: str) -> bool:
    word = word.strip("()")
    if not word or word[0].isdigit() or word.lower() == "finite" or "//" in word:
        return False
    return LETTER.search(word) is not None or _SYMBOL.search(word) is not None


def _is_place(word: str) -> bool:
    bare = word.strip("()#[],.:@").lower()
    return not bare or bare in PLACES or not LETTER.search(bare) or _DIGIT.match(bare) is not None


def _is_parenthesis(word: str) -> bool:
    return word[0] == "(" and word[-1] == ")" and word[1:-1].replace("_", "").isalpha()


def _is_attribute(word: str) -> bool:
    """Whether a word before a metric belongs to its name: "Dur Loss", "average training loss"."""
    return (
        re.fullmatch(r"[^\W\d][\w./@-]*", word) is not None
        and word.lower() not in _STOPS
        and not _FILE.fullmatch(word)
        and not LEVEL.match(word)
        and not word.lower().endswith(("ing", "ed"))
    ) or word.lower() in ("training", "combined", "weighted", "smoothed", "unscaled", "scaled")
