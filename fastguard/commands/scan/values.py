"""Decides which NaN and Inf in a line of text are measured values and which are only mentions.

In "loss: nan", the NaN is a value; in "checking for nan values", it is a mention. These are also
mentions: bounds that begin at infinity ("val_loss improved from inf to 0.69", "best_acc=-inf"),
rates ("samples per second: inf"), settings ("missing=nan") and the log level INF.

A NaN or Inf is a value if a name precedes it in the same clause, or if it is among numbers. Its
name is the nearest name before the separator. A step or epoch between the two is skipped, as in
"Cost after iteration 100: nan".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from fastguard.commands.scan.names import CLAUSE, LETTER, name_in
from fastguard.commands.scan.sentences import CONDITIONAL, DENIED, bad_of_sentence, is_possibility
from fastguard.commands.scan.spellings import NUMBER, TOKEN, canonical, may_have, runs
from fastguard.commands.scan.vocabulary import LEVEL, UNIT_OF_RATE, is_bound, is_metric

CONTEXT = 100
"""Number of characters considered on either side. Matching may take quadratic time in this
number.
"""

LISTED = 4
"""Maximum number of array values listed individually. Of all further values, each kind is listed
once.
"""


class Value(NamedTuple):
    """A measured NaN or Inf.

    Attributes:
        name: Name of the value; "" if the line does not give one.
        text: `"nan"`, `"inf"` or `"-inf"`; `"non-finite"` if the line does not say which.
    """

    name: str
    text: str


_OPENERS = re.compile(
    r"(?:<tf\.Tensor:[^>]{0,60}numpy=|Tensor\(shape=.{0,90}?stop_gradient=\w{4,5},\s|(?:\b[a-z]{1,6}\.)?"
    r"(?:tensor|array|Array|DeviceArray|NDArray|Parameter|Tensor|Decimal|float\d*)\("
    r"|[\[({<\"'$`*~≈≃]|\s)*$"
)
_SEPARATORS = ":=：＝|｜│┃║¦→⇒∣∶꞉︓﹕﹦≔▏▕・"
_VERB = re.compile(
    r"\s+(?:is|was|are|were|equals|became|becomes|become|turned|turns|went|goes|diverged|exploded|reached|hit"
    r"|came out)(?:\s+(?:now|to|at|as|already|also|still|currently))?$|[为是は]$",
    re.IGNORECASE,
)
_NUMBER_BEFORE = re.compile(
    rf"(?:^|[\s,;|\[(:=/│┃]){NUMBER}[\])]?(?:\s*[,;|｜/│┃±]\s*|\s+|\s*-*=?>\s*|\s*\+/-\s*)?$",
    re.IGNORECASE,
)
_BESIDE = re.compile(r"\d\s*(?:\(|±\s?|\+/-\s?)$")
_LEVEL = "\0level"  # returned instead of a name for the log level INF, which is short for INFO
_DIGITS = str.maketrans("023456789", "111111111")
_STATISTICS = ("max", "min", "mean", "std", "sum")
_CALL = re.compile(r"([A-Za-z_][\w.]*)\([^()]*(?:\([^()]*\)[^()]*)*$")
_CONTAINER = re.compile(
    r"(?:\w*(?:tensor|array|float\d*|parameter|decimal|print|scalar|variable))$", re.IGNORECASE
)

# Matches the text after a value, but not the text after a word in a sentence.
_NO_WORD = re.compile(
    rf"[\"'`\])}}>%*]*\s*"
    rf"(?:$|[,;|/，；│┃]?\s*{NUMBER}|[,;，；]?\s*[^\W\d][\w./@%-]*(?: [^\W\d][\w./@%-]*)?[\"']?\s*"
    rf"[=:：＝]|[\[(<|–—│┃║±。;；-]|[,，](?:\s*$|\s*[\[(\"'])|\.\s*$)",
    re.IGNORECASE,
)
# A word directly after the token shows that it is part of a name: "nan gradients: 0".
_ALONE = re.compile(r"[\"'`\])}>%]*\s+[^\W\d_]")
_ARRAY = re.compile(
    r"(?:\s*[:=]?\s*(?:[a-z.]{1,20}\()?[\[(]|[:=]\s)[\d\s.,+\-einf\[\]()]*$", re.IGNORECASE
)
_CONTAINER_BEFORE = re.compile(r"(?:tensor|array|float)\(\[*$", re.IGNORECASE)
_QUOTED_FLOAT = re.compile(r"float\([\"'][+-]?$")
_SHARE = re.compile(r"\d%\s$")
"""Matches the text before the NaN in "12% nan"."""
_PANDAS = re.compile(r"\d\s{2,}$")
"""Matches the text before a missing value in a row of a table that pandas printed."""
_ARROW = re.compile(r"\s*[-=~]+>$")
_IN_BARS = re.compile(r"[|│┃]\s*([^\W\d][\w./-]{0,40})\s$"), re.compile(r"\s*(?:[|│┃]|$)")
"""Match the texts around a value whose cell also contains its name: `| tr nan | val 2.3`."""
_INTERVAL = re.compile(
    r"(?:\(\s*-inf,\s*(?:[^,\]()]{1,20}\]|\+?inf\s*\))|\[[^,\[\]()]{1,20},\s*\+?inf\s*\))",
    re.IGNORECASE,
)
_CLOSER = re.compile(r"[\"']?\s*(?:[\])}]|,\s*(?:device|dtype|grad_fn|requires_grad)=)")
_BETTER = re.compile(r"\)?\s*(?:-*=?>|→|to\b)", re.IGNORECASE)
_BEFORE_BOUND = re.compile(r"(?:\bfrom|\s[<>]=?)\s+$")
_DIGIT = re.compile(r"\d")
_CELLS = re.compile(r"[\d\s.,;+eE-]*$")
_BESTS = re.compile(r"\b(?:best|from|lowest|highest)\b", re.IGNORECASE)


def has_nonfinite(text: str) -> bool:
    """Whether the text contains NaN or Inf, either as a value or as a word."""
    return may_have(text.lower()) and (
        TOKEN.search(text) is not None or bad_of_sentence(text) is not None
    )


@lru_cache(64)  # the scanner and each dialect pass the same line
def nonfinite_values(text: str) -> tuple[tuple[Value, ...], bool]:
    """Returns the NaN and Inf values in a line, and whether it also contains mentions.

    Example:
        >>> nonfinite_values("INFO epoch 3 loss: nan, grad norm inf (nano-banana inference)")
        ((Value(name='loss', text='nan'), Value(name='grad norm', text='inf')), False)
        >>> nonfinite_values("no nan found; val_loss improved from inf to 0.69")
        ((), True)
    """
    if not may_have(text.lower()):
        return (), False
    found: list[Value] = []
    mentions = False
    sentence = bad_of_sentence(text)
    if sentence is not None:
        found.append(Value(sentence.name, _in_sentence(sentence.value.lower())))
    for run in runs(text):
        if sentence is not None and sentence.start <= run.start() < sentence.end:
            continue
        first = TOKEN.match(text, run.start())
        assert first is not None
        before = text[max(0, run.start() - CONTEXT) : run.start()]
        after = text[run.end() : run.end() + CONTEXT]
        rest = text[first.end() : min(run.end(), first.end() + CONTEXT)]
        name = _name(before, rest + after, after, first[0])
        if name == _LEVEL:
            continue
        if name is None:
            mentions = True
            if run.end() == first.end():
                continue
        else:
            found.append(Value(name, canonical(first[0])))
        if name is not None:
            found += _others(text, first.end(), run.end())
    return tuple(found), mentions


def _others(text: str, begin: int, end: int) -> Iterator[Value]:
    """Yields the array values after the first: up to `LISTED`, then each remaining kind once."""
    kinds = set()
    for token in islice(TOKEN.finditer(text, begin, end), LISTED):
        kinds.add(canonical(token[0]))
        yield Value("", canonical(token[0]))
        begin = token.end()
    if len(kinds) < 3 and begin < end:
        rest = text[begin:end].lower()
        if "nan" not in kinds and ("nan" in rest or "ind" in rest):
            yield Value("", "nan")
        negative = rest.count("-inf") + rest.count("-1.#inf")
        if "-inf" not in kinds and negative:
            yield Value("", "-inf")
        if "inf" not in kinds and rest.count("inf") > negative:
            yield Value("", "inf")


def _name(before: str, after: str, end: str, token: str) -> str | None:
    """Calls `_name_of_value` with all digits replaced with 1, so that more calls are cached."""
    if DENIED.match(after):
        return None
    alike = before.translate(_DIGITS)
    name = _name_of_value(alike, after.translate(_DIGITS), end.translate(_DIGITS), token)
    if not name or "1" not in name:
        return name
    at = alike.rfind(name)
    if at < 0:  # the words of the name are not adjacent in the text
        return _name_of_value(before, after, end, token)
    real = before[at : at + len(name)]
    if is_metric(name) and not is_metric(real):  # "f3" is not "f1"
        return _name_of_value(before, after, end, token)
    return real


def _in_sentence(value: str) -> str:
    """Returns the kind for words such as "NaN", "infinite" or "inf or nan"."""
    if "nan" in value and "inf" not in value:
        return "nan"
    return "inf" if "inf" in value and "nan" not in value and "non" not in value else "non-finite"


@lru_cache(1 << 11)
def _name_of_value(before: str, after: str, end: str, token: str) -> str | None:
    """Returns the name of the value between two texts: "" for no name, None if it is a word.

    Args:
        before: The text before the value, up to `CONTEXT` characters.
        after: The text after it.
        end: The text after the array or row that it begins.
        token: The token as written.
    """
    text = canonical(token)
    if _SHARE.search(before) or (token == "NaN" and _PANDAS.search(before)):
        return None
    if text != "nan" and (_BETTER.match(after) or _BEFORE_BOUND.search(before)):
        return None
    if UNIT_OF_RATE.match(end):
        return None
    if text != "nan" and _INTERVAL.search(before[-20:] + token + after[:20]):
        return None
    level = token == "INF"  # some loggers abbreviate INFO in this way
    opened = _OPENERS.search(before)
    assert opened is not None  # the pattern also matches the empty string
    stem = before[: opened.start()]
    if _QUOTED_FLOAT.search(before):  # the line is source code, since printed values have no quotes
        return None
    if not stem and not _CONTAINER_BEFORE.search(before):
        return _LEVEL if level and LETTER.search(end) else _at_start(before, after, end)
    call = _CALL.search(before)
    container = call is not None and _CONTAINER.fullmatch(call[1]) is not None
    if (arrow := _ARROW.search(stem)) and (
        stem.endswith("]", 0, arrow.start()) or not _NUMBER_BEFORE.search(stem)
    ):
        stem = stem[: arrow.start()] + "="
    if stem[-1:] in _SEPARATORS and stem:
        name = name_in(stem.rstrip(_SEPARATORS + " "), separated=True)
        if _NUMBER_BEFORE.search(stem) and not (name and stem[-1] in ":：=＝" and is_metric(name)):
            name = None
        if name:
            return _separated(name, stem, end, text, in_call=call is not None and not container)
    elif verb := _VERB.search(stem):
        name = name_in(stem[: verb.start()], separated=False)
        if name and is_metric(name):
            return _measured(name, before, text)
        return None
    else:
        name = name_in(stem, separated=False)
        last = name.split()[-1] if name else ""
        if name and (is_metric(last) or last in _STATISTICS) and not stem.endswith((",", ";")):
            return _measured(name, before, text)
    if (cell := _IN_BARS[0].search(before)) and _IN_BARS[1].match(end):
        return None if is_bound(cell[1], text) else cell[1]
    if call is not None and not container:
        return None
    if level and (LETTER.search(end) or LETTER.search(before)):
        return _LEVEL
    if (array := _ARRAY.search(before)) is not None:
        name = name_in(before[: array.start()], separated=True)
        if name and is_bound(name, text):
            return None
    return _among_numbers(before, after, end)


def _measured(name: str, before: str, text: str) -> str | None:
    """Returns the name of a metric in a sentence; None if the sentence is about a possibility."""
    if is_bound(name, text) or is_possibility(before):
        return None
    return name


def _separated(name: str, stem: str, end: str, text: str, *, in_call: bool) -> str | None:
    """Returns a name followed by a separator; None if it is a bound, a rate or a setting."""
    if is_bound(name, text) or (not is_metric(name) and is_bound(name.split()[-1], text)):
        return None
    clause = CLAUSE.split(stem[:-1])[-1].strip(" \"'`()")
    if LEVEL.match(clause):
        return None
    if not is_metric(name) and (len(clause.split()) > 4 or clause.endswith(" as")):
        return None  # a sentence
    if is_bound(clause, text) and not is_metric(name):
        return None
    if text != "nan" and _BESTS.search(clause):
        return None
    if stem.endswith(("==", "!=")) or (is_metric(name) and CONDITIONAL.search(stem)):
        return None
    if is_metric(name):
        return name
    if in_call:
        return None
    if stem[-1] in "=＝" or _NO_WORD.match(end):
        return name
    return None


def _among_numbers(before: str, after: str, end: str) -> str | None:
    if _CONTAINER_BEFORE.search(before) and (_CLOSER.match(after) or _CLOSER.match(end)):
        return ""
    if _CELLS.match(after) and _CELLS.match(before):  # a table row such as "2,nan,"
        return ""
    if not _stands_alone(end):
        return None
    if (number := _NUMBER_BEFORE.search(before.rstrip("([ \t"))) is not None:
        return _beside_number(before, number) or ""
    if re.search(r"[|,;│┃]\s*[\"'\[(]*$", before):
        return _at_start(before, after, end)
    return None


def _beside_number(before: str, number: re.Match[str]) -> str | None:
    """Returns the metric whose mean or deviation follows it: "loss: 0.5 (nan)", "0.5 ± nan"."""
    if _BESIDE.search(before) is None:
        return None
    stem = before[: number.start() + 1].rstrip(_SEPARATORS + " ")
    name = name_in(stem, separated=True)
    return name if name and is_metric(name) else None


def _at_start(before: str, after: str, end: str) -> str | None:
    """Returns "" for a value with only brackets before it, or None if it is a word."""
    if not _stands_alone(end):
        return None
    others = TOKEN.sub("", before + after)
    return "" if not LETTER.search(others) or _DIGIT.search(others) else None


def _stands_alone(end: str) -> bool:
    """Whether no word of the same clause follows the value."""
    if _ALONE.match(end):
        return False
    return _NO_WORD.match(end) is not None or _CLOSER.match(end) is not None
