"""Finds messages that report NaN or Inf in words, without a printed value.

RuntimeError: Function 'MulBackward0' returned nan values in its 0th output.   (torch)
FloatingPointError: invalid value (nan) encountered in jit(train_step)         (JAX)
FloatingPointError: Loss became infinite or NaN at iteration=40!               (detectron2)
AssertionError: Rank 0: found NaN in local grad norm in backward pass          (Megatron)
Detected nan and/or inf values in `encoder.weight`.                            (Lightning)
Batch 3: Invalid loss, terminating training                                    (Keras)

All of these sentences consist of the kind of value, a verb such as "found", and a place.
Sentences about a possibility ("if", "when", "no", "checks") or about input data are ignored.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastguard.commands.scan.names import PLACES

WINDOW = 160
"""Number of characters on either side of a NaN that are searched for a message about it."""

WINDOWS = 4
"""Maximum number of windows searched per line; a message is near the beginning."""


LONG = 600
"""In lines of at least this length (arrays or tables), only the first NaN is considered."""


class Sentence(NamedTuple):
    """A sentence that reports NaN or Inf.

    Attributes:
        name: The name of the value that was NaN or Inf; "" if not stated.
        value: The kind, in the words of the line: "NaN", "infinite", "inf or nan", "non-finite".
        start, end: Span in the line.
    """

    name: str
    value: str
    start: int
    end: int


_BAD = r"(?:nans?|infs?|infinite|infinity|infinities|non[ -]?finite)"
_EITHER = (
    rf"[`'\"(]?(?P<value>(?<![\w-]){_BAD}(?:[`'\"]?(?:\s?/\s?|,\s|\s(?:or|and|and/or)\s)[`'\"]?{_BAD})"
    r"{0,2})(?![\w-])[`'\")]?"
)
_ADJECTIVE = (
    r"(?:(?:train|training|val|validation|total|local|global|forward|grad|gradient|mean|average|avg|"
    r"loss|policy|value|generator|discriminator|model|predicted|attention|hidden|output|input|"
    r"critic|actor|mlm|ctc|kl|reconstruction|average|minibatch|batch|"
    r"probability|weight|parameter|update|[a-z]{1,12}_)[ _]?){0,3}"
)
_SUBJECT = (
    rf"(?P<name>{_ADJECTIVE}(?:loss|losses|cost|norm|norms|grad|grads|gradient|gradients|weights?|"
    r"param|params|parameters?|activations?|outputs?|logits?|probabilit(?:y|ies)|predictions?|boxes|"
    r"scores?|objective(?: function)?|elbo|rewards?|actions?|observations?|states?|embeddings?|"
    r"updates?|tensors?|matrix|logprobs?|model|metric|[qv][ _-]?values?|advantages?|targets?|"
    r"layers?|function|scale))"
)
# Excludes input data, since missing values in a table do not mean that training diverged.
_PLACE = (
    r"(?!(?:the |your |an? )?(?:input|data|dataset|dataframe|columns?|rows?|csv|files?|features?|"
    r"config\w*|log|annotations?|metadata|cells?|table|raw)\b)"
    r"(?:the |your |its |an? )?[`'\"]?(?P<name>"
    rf"{_SUBJECT.removeprefix('(?P<name>').removesuffix(')')}\b|[\w.\[\](){{}}/-]{{1,80}})"
)
_MET = (
    r"(?:found|detected|encountered|produced|generated|returned|returning|got|gave|hit|saw|seen|"
    r"observed|contains?|contained|containing|had|there (?:is|are|was|were)|due to|"
    r"because of|caused by)"
)
_PASSIVE = r"(?:found|detected|encountered|produced|generated|returned|occurred|seen|observed)"
_WAS = r"(?:was |were |is |are |has been |have been )?"
_KINDS = r"(?: (?:values?|elements?|entries|numbers?))?"

# As in "has_nan: True" or "is_finite=False". With spaces around "=", the text is source code.
_FLAG = (
    r"(?<!data )(?<!dataset )(?<!input )(?:\b|_)"
    r"(?:(?:has|is|any|contains?)[ _]?(?P<value>nan|inf)s?['\"]?(?:=|:\s{0,9})"
    r"(?:true|yes)\b"
    r"|(?:is|all|loss|grads?|gradients?)[ _]?(?P<finite>finite)['\"]?(?:=|:\s{0,9})(?:false|no)\b)"
)

# Quantifiers are bounded to limit the time per line.
_SENTENCES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"function '?(?P<name>\w{{1,80}})'? returned {_EITHER} values?\b",
        rf"invalid (?:value )?{_EITHER} (?:value )?encountered in (?:the )?"
        r"(?P<name>[\w.()\[\]-]{1,60})",
        r"\b(?P<value>invalid value) encountered in (?P<name>[\w.()\[\]-]{1,60})",
        r"\binvalid (?P<name>loss), terminating training",
        r"\b(?:minimum (?P<name>loss scale) reached|(?P<other>loss scale) already at minimum)",
        rf"\bcannot convert float {_EITHER} to integer",
        rf"\b{_EITHER} in summary histogram for:? (?P<name>\S{{1,80}})",
        rf"\bunexpected result {_EITHER}",
        # darknet
        r"\d: [+-]?(?P<value>nan|inf), [+-]?(?:nan|inf|[\d.]{1,20}) (?P<name>avg loss)\b",
        rf"\bthe (?P<name>loss) returned in \S{{1,60}} is {_EITHER}",
        rf"\bthe (?P<name>total norm) of order \S{{1,20}} for gradients .{{1,60}} is {_EITHER}",
        rf"\b{_SUBJECT}(?: (?:at|in|on|of|for|from) [\"'`]?[\w./:-]{{1,40}}[\"'`]?"
        r"(?: \d{1,9}(?:-\d{1,9})?)?){0,3}+"
        r"(?: or scores)? (?:is|was|are|were|became|becomes?|has become|have become|went|hit|"
        r"turned(?: in?to)?|contains?|contained|has|have|had|exploded to|diverged to)"
        rf"(?: now)?(?: an?| the| some| either| all)? {_EITHER}",
        rf"\b{_SUBJECT}(?: \S{{1,40}}){{0,2}} contains? {_EITHER}",
        rf"\b{_MET} {_EITHER}: {_SUBJECT}",
        rf"\b{_MET}(?: an?| some| any| either| invalid)? {_EITHER} {_SUBJECT}\b",
        rf"\b{_MET}(?: an?| some| any| either)? {_EITHER}{_KINDS}(?: \([^)]{{1,60}}\))? "
        rf"(?:in|for|from|at) {_PLACE}",
        rf"\b{_EITHER} {_SUBJECT}(?: values?)? (?:{_WAS}{_PASSIVE}\b|during training"
        r"|(?:at|in|on) (?:step|iter|iteration|epoch|batch|update)\W{0,3}\d)",
        rf"\b{_SUBJECT} {_EITHER} {_PASSIVE}\b",
        rf"\b{_EITHER} {_SUBJECT}(?: values?)?[,;:.!-]{{0,2}} "
        r"(?:(?:skipp|stopp|end|abort|terminat|exit|restart|roll|recover)|(?<=\W )[a-z]{2,12})"
        r"ing\b",
        rf"(?:^|[:\]!-]\s{{1,3}}){_EITHER}(?: values?)? in (?:the )?{_SUBJECT}\b",
        rf"(?:^|[:\]!-]\s{{1,3}}){_EITHER} {_SUBJECT} (?:in|at|on) (?:the\b|layers?\b|rank\b|\d)",
        rf"\b{_SUBJECT}[`'\"]? (?:(?:is|are|was|were|became) )?(?P<value>not (?:an? )?"
        r"(?:finite(?: number)?|number))\b",
        rf"\b{_EITHER}{_KINDS} {_WAS}{_PASSIVE} (?:in|on|at|for|by|during) {_PLACE}",
        rf"\b{_EITHER}{_KINDS} {_WAS}{_PASSIVE}(?=\s*(?:[.!,:;]|$))",
        rf"^\W*{_EITHER} {_SUBJECT}\W*$",
        r"\b(?:skipp|dropp|discard|ignor)\w{2,4} [1-9]\d{0,9} \w{1,20} (?:with|due to) "
        rf"{_EITHER} {_SUBJECT}",
        _FLAG,
        rf"\w(?:error|exception):.{{0,120}}?\b(?:contains?|contain|had|produced|returned) (?:an? )?"
        rf"{_EITHER}",
    )
)
COUNT = re.compile(
    rf"\b(?:number of|num|count of|total|found|detected|skipped|with)[ _](?P<value>{_BAD})"
    r"(?:[ _](?:iterations?|iters?|steps?|values?|elements?|grads?|gradients?|losses|loss|batches|"
    r"samples|updates|params|parameters|weights))?\s{0,9}[:=]\s{0,9}(?P<n>\d{1,15})\b"
    rf"|\b(?P<value2>{_BAD})[ _](?:count|iterations|steps|grads|gradients|elements|losses|batches|"
    r"updates)\s{0,9}[:=]\s{0,9}(?P<n2>\d{1,15})\b"
    rf"|\b(?:found|detected|encountered|got|skipped|with) (?P<n3>\d{{1,15}}) (?P<value3>{_BAD})[ -]"
    r"(?:(?:values?|elements?) in (?:the )?(?:grad|loss|weight|param|activation|logit|output)|"
    r"(?:grad|loss|weight|param|activation|logit|output|batch|step|update|iteration)\w{0,9}\b)"
    r"|\b(?P<n4>\d{1,15})(?:/\d{1,15})? samples got (?P<value4>nan|inf) grad",
    re.IGNORECASE,
)
"""A count of NaN or Inf, which reports a problem unless the count is 0."""

_ERROR = _SENTENCES[-1]
_VERBS = re.compile(
    "avg|found|detected|encountered|occurred|return|generated|produced|contain|there|due|turned|became"
    "|become|went|exploded|during|convert|invalid|unexpected|summary|reached|already|num|count"
    "|samples|skipped|iterations|observed|grads|gradients|steps|elements|losses|batches|updates"
    "|any|is_|isnan|isinf|finite|^\\W*(?:nan|inf)|has_|observed|gave|diverged|ing| is| was| are"
    "| were| has| have| had| got| hit| saw| seen| in | at | on | with "
)
"""Text without any of these words contains no sentence that reports NaN or Inf."""

_IF = (
    r"\b(?:if|in case|when|whenever|whether|unless|until|once|assert|wenn|falls|si|cuando|quando|se"
    r"|если|когда|jeśli)\b|如果|若|当(?!前)|當(?!前)|もし|場合|만약|경우"
)
CONDITIONAL = re.compile(_IF, re.IGNORECASE)
_CONDITION = re.compile(
    rf"{_IF}|\b(?:not|no|never|without|free of|checks?|checking|will|would|should|could|may|might"
    r"|can|clipping \w+ (?:at|to)|avoid|prevents?|raises?|test that|replac\w+|ignor\w+|handl\w+"
    r"|isn't|aren't|kein|keine|sin|senza|без)\b|没有|\b(?:0|zero)\s+$|[!=]=\s*$",
    re.IGNORECASE,
)
DENIED = re.compile(
    r"[\"'`\s]*(?:(?:count|rows|cells|entries|values|elements)?\s?[:=?]\s*"
    r"(?:false|0(?![\d.%:])|no|none|never|off|disabled)\b"
    r"|(?:detection|checks?|checking|checker|filter|handling|policy|protection|guard)\b)",
    re.IGNORECASE,
)
_TRIGGER = re.compile(
    rf"(?<![a-z])(?:is)?{_BAD}(?![a-z])|finite['\"]?[:=]|invalid value enc|not finite"
    r"|not a (?:finite )?number|invalid loss|loss scale",
    re.IGNORECASE,
)
_END = re.compile(r"[.;!]\s|\n")


def bad_of_sentence(text: str) -> Sentence | None:
    """Returns the first sentence in a line that reports NaN or Inf, or None.

    Example:
        >>> bad_of_sentence("NaN loss at step 40000").name
        'loss'
        >>> bad_of_sentence("stop if NaN loss detected") is None
        True
    """
    seen = 0
    for _ in range(WINDOWS if len(text) < LONG else 1):
        trigger = _TRIGGER.search(text, seen)
        if trigger is None:
            return None
        begin = max(0, trigger.start() - WINDOW)
        seen = trigger.start() + WINDOW
        window = text[begin:seen]
        if _VERBS.search(window.lower()) is None:
            continue
        if (found := _in_window(window, trigger.start() - begin)) is not None:
            return found._replace(start=found.start + begin, end=found.end + begin)
    return None


def is_possibility(before: str) -> bool:
    """Whether the last sentence of the text is about a possibility: "if", "no", "checks"."""
    return _CONDITION.search(_END.split(before)[-1]) is not None


def _in_window(text: str, trigger: int) -> Sentence | None:
    # One check serves all patterns, since a condition before a sentence also precedes its NaN.
    for pattern in (_ERROR,) if is_possibility(text[:trigger]) else _SENTENCES:
        for match in pattern.finditer(text):
            if DENIED.match(text, match.end()) or text[match.end() :].lstrip()[:1] == "?":
                continue
            groups = match.groupdict()
            name = groups.get("name") or groups.get("other") or ""
            value = groups.get("value") or "non-finite"
            if value.lower().startswith(("not ", "invalid ")):
                nan = value.lower() in ("not a number", "invalid value")
                value = "nan" if nan else "non-finite"
            name = name.strip("`'\",.:[] ")
            name = "" if name.lower() in PLACES else name
            name = name if name.count("(") == name.count(")") else name.strip("()")
            return Sentence(name, value, match.start(), match.end())
    for match in COUNT.finditer(text):
        groups = [(match["value"], match["n"])]
        groups += [(match[f"value{i}"], match[f"n{i}"]) for i in (2, 3, 4)]
        value, number = next(pair for pair in groups if pair[1] is not None)
        if int(number):
            return Sentence("", value, match.start(), match.end())
    return None
