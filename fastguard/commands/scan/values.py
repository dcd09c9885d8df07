"""Which NaN and Inf in a line of text are values, and which are words.

"loss: nan" is a value; "info", "nano" and "banana" are nothing; "checking for nan values" is a
mention: it has the word, but nobody measured it there. Bounds that begin at infinity, as in
"val_loss improved from inf to 0.69" or "best_loss=inf", are mentions too, and so are clocks: "eta:
nan".
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastguard.commands.scan.sentences import bad_of_sentence

CONTEXT = 100
"""Characters on either side that decide. All patterns here may be quadratic in it."""


class Value(NamedTuple):
    """A NaN or Inf that was measured.

    Attributes:
        name: What it is the value of, "" if the line does not say.
        text: `"nan"`, `"inf"` or `"-inf"`; `"non-finite"` if the line does not say which.
    """

    name: str
    text: str


# As Python, numpy, C and JavaScript print them, with the zeros that Lightning appends ("nan.0");
# 1.#QNAN, -1.#IND and 1.#INF are those of Microsoft's older C library. "NaN/Inf" is a word.
_TOKEN = re.compile(
    r"(?<![\w.#@\\-])[+-]?"
    r"(?:(nan|inf(?:inity)?)(?:\.0*)?(?![\w-]|/(?!\1\b)[a-z])|1\.#(?:[qs]?nan|ind|inf)\d*)",
    re.IGNORECASE,
)
_NUMBER = r"[+-]?(?:\d[\w.+%-]*|\.\d+|nan|inf(?:inity)?)"
_NAME = r"[A-Za-z_][\w./@%-]*"
_OPENERS = r"(?:tensor\(|array\(|np\.float\d+\(|float\(|[\[({<\"'$|]|\s)*"

# What stands before a value.
_AFTER_SEPARATOR = re.compile(rf"({_NAME}(?: {_NAME})?)[\"'\])]*\s*([=:]){_OPENERS}$")
_AFTER_NAME = re.compile(rf"({_NAME}(?: {_NAME})?)(?:\s+|\s*\|\s*)[(\[]?$")
_AFTER_VERB = re.compile(
    rf"({_NAME})\s+(?:is|was|are|were|became|becomes|turned|went)\s+(?:now\s+)?$", re.IGNORECASE
)
_AFTER_NUMBER = re.compile(
    rf"(?:^|[\s,;|\[(:=/]){_NUMBER}(?:\s*[,;|/]\s*|\s+|\s*-*=?>\s*)[(\[]?$", re.IGNORECASE
)
_AFTER_START = re.compile(r"(?:^|[|,;]|tensor\(|array\(|[\[])\s*[\"']?$")

# What stands after it, if it is not a word in a sentence.
_BEFORE_NO_WORD = re.compile(
    rf"[\"'\])}}>%]*\s*"
    rf"(?:$|[,;|/]?\s*{_NUMBER}(?!\w)|[,;|]?\s*{_NAME}[\"']?\s*[=:]|[\[(<|–—-])",
    re.IGNORECASE,
)
_BEFORE_CLOSER = re.compile(r"[\"']?\s*(?:[\])}]|,\s*(?:device|dtype|grad_fn|requires_grad)=)")
_BEFORE_BETTER = re.compile(r"\)?\s*(?:-*=?>|→|to\b)", re.IGNORECASE)
_CONDITION = re.compile(
    r"\b(?:if|in case|when|whenever|whether|unless|until|assert|not|no)\b", re.IGNORECASE
)
_DIGIT = re.compile(r"\d")
_LETTER = re.compile(r"[^\W\d_]")

_METRIC = frozenset(
    "loss losses norm grad grads gradient gradients acc accuracy err error ppl perplexity mse mae "
    "rmse nll elbo kl ce bce score mean std avg average auc iou miou dice map f1 bleu psnr ssim "
    "gnorm reward return entropy lr fitness metric bpb bpc wer cer logits precision recall".split()
)
_KIND = frozenset(
    "train training val valid validation test eval lm d g gen disc total grad gradient aux running "
    "avg mean global policy value box cls dfl obj seg mlm reconstruction best min max".split()
)
_LEVEL = re.compile(
    r"(?:debug|info|note|warn|warning|error|critical|fatal|hint|tip|\w+(?:error|warning|exception))$",
    re.IGNORECASE,
)
_BOUND = re.compile(
    r"(?:best|max|min|init|initial|patience|clip|timeout|limit|threshold|mode)(?:$|[_./ -])",
    re.IGNORECASE,
)
_CLOCK = re.compile(
    r"(?:.{0,40}[_./ -])?(?:eta|time|remaining|elapsed|duration|speed|throughput|seconds|secs|fps"
    r"|(?:\w{1,9}/)?s(?:ec)?|s/\w{1,9})$",
    re.IGNORECASE,
)
_CELLS = re.compile(r"[\d\s.,;+eE-]*$")
_PART = re.compile(r"[A-Za-z]+\d?")


def has_nonfinite(text: str) -> bool:
    """Whether the text has NaN or Inf as a token, be it a value or a word."""
    return _may_have(text) and (
        _TOKEN.search(text) is not None or bad_of_sentence(text) is not None
    )


def first_nonfinite(text: str) -> int:
    """Where the first such token begins; 0 if there is none."""
    token = _TOKEN.search(text)
    return token.start() if token else 0


def nonfinite_values(text: str) -> tuple[tuple[Value, ...], bool]:
    """The values in a line that are NaN or Inf, and whether there are mentions beside them.

    Example:
        >>> nonfinite_values("INFO epoch 3 loss: nan, grad norm inf (nano-banana inference)")
        ((Value(name='loss', text='nan'), Value(name='grad norm', text='inf')), False)
        >>> nonfinite_values("no nan found; val_loss improved from inf to 0.69")
        ((), True)
    """
    found: list[Value] = []
    mentions = False
    if not _may_have(text):
        return (), False
    sentence = bad_of_sentence(text)
    if sentence is not None:
        found.append(Value(sentence["name"], _in_sentence(sentence["value"].lower())))
    for token in _TOKEN.finditer(text):
        if sentence is not None and sentence.start() <= token.start() < sentence.end():
            continue
        before = text[max(0, token.start() - CONTEXT) : token.start()]
        after = text[token.end() : token.end() + CONTEXT]
        name = _name_of_value(before, after, canonical(token[0]))
        if name is None:
            mentions = True
        else:
            found.append(Value(name, canonical(token[0])))
    return tuple(found), mentions


def _may_have(text: str) -> bool:
    """Ten times as fast as the pattern, for the lines of a log that are fine; "INFO" is one."""
    lower = text.lower()
    return (
        _has_word_end(lower, "nan")
        or _has_word_end(lower, "inf")
        or "infinity" in lower
        or "1.#" in lower
        or "finite" in lower
    )


def _has_word_end(text: str, end: str) -> bool:
    at = text.find(end)
    while at >= 0:
        after = text[at + len(end) : at + len(end) + 1]
        if not after.isalnum():
            return True
        at = text.find(end, at + 1)
    return False


def canonical(token: str) -> str:
    """`"nan"`, `"inf"` or `"-inf"`."""
    if "n" in token.lower().replace("inf", "").replace("inity", ""):  # nan, qnan, ind
        return "nan"
    return "-inf" if token.startswith("-") else "inf"


def _in_sentence(value: str) -> str:
    """What "NaN", "infinite" or "inf or nan" says."""
    if "non" in value or ("nan" in value and "inf" in value):
        return "non-finite"
    return "nan" if "nan" in value else "inf"


def is_bound(name: str, text: str) -> bool:
    """Whether a value of this name is none of training: a bound that begins at Inf, or a clock."""
    return (text == "inf" and _BOUND.match(name) is not None) or _CLOCK.match(name) is not None


def is_metric(name: str) -> bool:
    """Whether a name is one of those that trainers measure."""
    parts = [part.lower() for part in _PART.findall(name)]
    return any(
        p in _METRIC or p.rstrip("0123456789") in _METRIC or p.endswith("loss") for p in parts
    )


def _name_of_value(before: str, after: str, text: str) -> str | None:
    """The name of the value between these two texts, "" if it has none; None: it is a word."""
    if text == "inf" and (_BEFORE_BETTER.match(after) or re.search(r"\bfrom\s+$", before)):
        return None
    if match := _AFTER_SEPARATOR.search(before):
        return _after_separator(match, after, text)
    if match := _AFTER_NAME.search(before):
        name = _short(match[1])
        if is_metric(name.split()[-1]):
            return None if _CONDITION.search(before) else name
    if (match := _AFTER_VERB.search(before)) and is_metric(match[1]):
        return None if _CONDITION.search(before) else match[1]
    if _BEFORE_CLOSER.match(after) and re.search(r"(?:tensor|array|float)\([\"']?$", before):
        return ""
    if _CELLS.match(after) and _CELLS.match(before):  # of a table: 2,nan,
        return ""
    if not _BEFORE_NO_WORD.match(after) and not _BEFORE_CLOSER.match(after):
        return None
    if _AFTER_NUMBER.search(before):
        return ""
    if _AFTER_START.search(before):
        others = _TOKEN.sub("", before + after)
        return "" if not _LETTER.search(others) or _DIGIT.search(others) else None
    return None


def _after_separator(match: re.Match[str], after: str, text: str) -> str | None:
    name = _short(match[1])
    last = name.split()[-1]
    if is_bound(last, text) or is_bound(name, text):
        return None
    if (
        match[2] == "="
        or is_metric(last)
        or (not _LEVEL.match(last) and _BEFORE_NO_WORD.match(after))
    ):
        return name
    return None


def _short(name: str) -> str:
    """Of two words both only if they are one name, such as "train loss" or "grad norm"."""
    first, _, last = name.rpartition(" ")
    return name if first.lower() in _KIND else last
