"""Sentences with which training code stops at NaN or Inf: no value, and yet evidence of one.

RuntimeError: Function 'MulBackward0' returned nan values in its 0th output.   (torch)
FloatingPointError: Loss became infinite or NaN at iteration=40!               (detectron2)
AssertionError: Rank 0: found NaN in local grad norm in backward pass          (Megatron)
The total norm of order 2.0 for gradients from `parameters` is non-finite      (torch)
The loss returned in `training_step` is nan or inf.                            (Lightning)
"""

from __future__ import annotations

import re

_BAD = r"(?:nan|inf(?:inite|inity)?|non-?finite)"
_EITHER = rf"(?P<value>{_BAD}(?:\s?/\s?{_BAD}|\s(?:or|and|and/or)\s{_BAD})?)(?![\w-])"
_WHAT = (
    r"(?P<name>(?:(?:train|training|val|total|local|global|forward|grad|gradient)[ _]){0,2}"
    r"(?:loss|losses|norm|grad|grads|gradient|gradients))"
)

# Bounded, so that no line takes long.
_SENTENCES = (
    re.compile(rf"function '(?P<name>\w{{1,80}})' returned {_EITHER} values?\b", re.IGNORECASE),
    re.compile(
        rf"\b{_WHAT} (?:is|was|became|becomes|has become|turned|went) {_EITHER}", re.IGNORECASE
    ),
    re.compile(rf"\b(?:found|detected|encountered) {_EITHER} in (?:the )?{_WHAT}\b", re.IGNORECASE),
    re.compile(
        rf"\b{_EITHER} {_WHAT} (?:(?:was |were )?(?:detected|found|encountered|occurred)\b"
        r"|(?:at|in|on) (?:step|iter|iteration|epoch|batch|update)\W{0,3}\d)",
        re.IGNORECASE,
    ),
    re.compile(rf"\b{_WHAT} {_EITHER} (?:detected|found|encountered)\b", re.IGNORECASE),
    re.compile(
        rf"\b{_EITHER} (?:was |were )?(?:detected|found|encountered) in (?:the )?{_WHAT}\b",
        re.IGNORECASE,
    ),
    re.compile(rf"\bthe (?P<name>loss) returned in \S{{1,60}} is {_EITHER}", re.IGNORECASE),
    re.compile(
        rf"\bthe (?P<name>total norm) of order \S{{1,20}} for gradients .{{1,60}} is {_EITHER}",
        re.IGNORECASE,
    ),
)
_VERB = re.compile(
    r"\b(?:found|detected|encountered|occurred|returned|is|was|became|becomes|become|turned|went"
    r"|at|in|on)\b"
)
_CONDITION = re.compile(
    r"\b(?:if|in case|when|whenever|whether|unless|until|assert|not|no|never|checks?|checking)\b",
    re.IGNORECASE,
)
_CONTEXT = 60
"""Characters before a sentence in which a condition makes it none."""


def bad_of_sentence(text: str) -> re.Match[str] | None:
    """The first such sentence in a line, with groups `name` and `value`, or None.

    Example:
        >>> bad_of_sentence("NaN loss at step 40000")["name"]
        'loss'
        >>> bad_of_sentence("stop if NaN loss detected") is None
        True
    """
    if not _VERB.search(text):
        return None
    for pattern in _SENTENCES:
        for match in pattern.finditer(text):
            before = text[max(0, match.start() - _CONTEXT) : match.start()]
            if not _CONDITION.search(before):
                return match
    return None
