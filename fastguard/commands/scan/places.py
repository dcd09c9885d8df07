"""Finds where in a run a line was written: "epoch 3", "[15/41]", "iter 100".

Launcher prefixes ("[1,0]<stdout>:", "[rank0]:", "0: ", a container's time), dates and settings
("Namespace(epoch=200)", "best epoch 3", "--epoch 200") are not places.
"""

from __future__ import annotations

import re

from fastguard.commands.scan.reading import INT, Where, span_of
from fastguard.commands.scan.vocabulary import is_metric

# Quantifiers are bounded, so that no line takes long.
_GAP = r"[\s:=#\[(\"'：＝]{0,9}"
_MODE = r"(?:\(\w{1,9}\))?"  # as in "Epoch(train) [3][ 100/1000]" of mmengine
_FREE = r"(?<![-\w.])"
_EPOCH = re.compile(
    rf"{_FREE}ep(?:och)?\b{_MODE}{_GAP}({INT}(?:\.[0-9]+)?)(?:\s*/\s*({INT}))?", re.IGNORECASE
)
_BATCH = re.compile(rf"{_FREE}(?:mini)?batch\b{_GAP}({INT})(?:\s*/\s*({INT}))?", re.IGNORECASE)
_STEP = re.compile(
    rf"{_FREE}(?:global_step|step|iter|iteration|it|num_updates|update)\b{_MODE}{_GAP}({INT})",
    re.IGNORECASE,
)
_STEPS = ("step", "it", "update")
_TUTORIAL = re.compile(rf"\s*\[({INT}),\s*({INT})\]")  # "[epoch, batch]" as in PyTorch's tutorials
_PAIR = re.compile(rf"\[\s*({INT})/({INT})\]\s{{0,3}}\[\s*({INT})/({INT})\]")  # [3/25][12/1583]
_ESPNET = re.compile(rf"(?<![-\w.])({INT})epoch:\w{{1,20}}:({INT})-{INT}batch:")
_COUNT = re.compile(
    rf"\[\s*({INT})\s*/\s*({INT})\b[^\]]{{0,40}}\]"  # [15/41]
    rf"|(?:^|[\s|:])({INT})/({INT}|\?)\s{{1,9}}[\[━╸]"  # "15/41 [" of tqdm and Keras
    rf"|:\s{{1,9}}({INT})\s{{0,9}}/\s{{0,9}}({INT})\s"  # "epoch 003:     15 / 41" of fairseq
)
# Matches the dates 2026/11/21 and 21/11/2026. Also matches 11/21 before a time of day, but not if
# the time is the clock of a bar, or if a name precedes the numbers, as in "Epoch 11/12 03:00:10".
_DATE = re.compile(
    r"\b(?:\d{4}/\d\d?/\d\d?|\d\d?/\d\d?/\d{4}"
    r"|(?<![a-z] )(?<![a-z]: )\d\d/\d\d(?=[ ,T]{1,3}\d\d:\d\d:\d\d(?!\s{0,9}<)))\b"
)
_TIME = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?"
_LAUNCHER = re.compile(
    r"\s*(?:"
    r"(?:[A-Z][a-z]{2} [A-Z][a-z]{2} {1,2}\d{1,2} [\d:]{8} \d{4})?"
    r"\[[\d,:\w-]{1,40}\]<std[\w ]{1,8}>:?"  # mpirun, horovodrun, SageMaker
    r"|\[(?:rank|default|worker|trainer|node|local_rank|proc|gpu|pid|host|task|replica)[ :=_]{0,2}"
    r"\d{1,5}\]:?"
    r"|(?:rank|worker|node|task|host|replica)[ _-]?\d{1,5}:(?=\s)"  # torchrun, accelerate, pdsh
    r"|\[\d{1,5}\]:|\(\d{1,5}\):?(?=\s)|\d{1,5}:(?=\s)"  # srun -l
    r"|\([\w.:-]{0,60}\s?pid=\d{1,9}[^)]{0,80}\)"  # ray
    rf"|{_TIME}(?: std(?:out|err) [FP])?(?=\s)"  # kubernetes, docker
    r"|\[pod/[\w./-]{1,120}\]|[\w.-]{1,60}[-_]\d{1,5}\s{1,9}\|"  # kubectl, docker compose
    r"|\w{3} [ \d]\d \d\d:\d\d:\d\d [\w.-]{1,60} [\w./-]{1,60}\[\d{1,9}\]:"  # journalctl
    r")",
    re.IGNORECASE,
)
_CALL = re.compile(r"\b[A-Za-z_][\w.]{0,60}\((?=[^()]{0,300}=)[^()]{0,2000}\)?")
_NAMES = re.compile(r"(\w+)['\"]?\s?[=:]")
_NOT_NOW = re.compile(
    r"(?:best|last|max|maximum|total|num|number of|warmup|warm-up|every|per|previous|prev|until"
    r"|since|from|target|patience|min|max)[\s_]?$",
    re.IGNORECASE,
)
_IN_FILE_NAME = re.compile(r"[-\w.=]{0,60}\.(?:ckpt|pt|pth|bin|safetensors|h5|pkl|npz)\b")
_CONFIG = re.compile(
    r"(?<!\w)(?:batch_?size|epochs|num_epochs|seed|weight_decay|num_workers|workers|momentum|dropout"
    r"|data_?dir|output_dir|lr_?scheduler|hidden_\w{1,20}|num_layers|n_layers?|warmup_\w{1,20}"
    r"|optimizer|model|dataset|imgsz|device|lr0|config|args|hparams)['\"]?\s?[=:]",
    re.IGNORECASE,
)
HEAD = 400
"""Number of characters that are searched for a place; further characters may be an array."""

_HAS_DIGIT = re.compile(r"[0-9]")


def where_in(text: str) -> Where:
    """The spans of a line that name its place."""
    text = text[:HEAD]
    if not _HAS_DIGIT.search(text):
        return Where()
    text = _without_launcher(text)
    if "/" in text:
        text = _DATE.sub(_blank, text)
    text = _without_settings(text)
    if pair := _TUTORIAL.match(text):
        return Where(epoch=pair.span(1), batch=pair.span(2))
    if pair := _PAIR.search(text):
        return Where(*(pair.span(group) for group in (1, 2, 3, 4)))
    if espnet := _ESPNET.search(text):
        return Where(epoch=espnet.span(1), batch=espnet.span(2))
    lower = text.lower()
    epoch = _now(_EPOCH, text) if "ep" in lower else None
    batch = _now(_BATCH, text) if "batch" in lower else None
    step = _now(_STEP, text) if any(word in lower for word in _STEPS) else None
    where = Where(
        epoch=span_of(epoch, 1),
        epochs=span_of(epoch, 2) if epoch and epoch[2] else None,
        batch=span_of(batch, 1),
        batches=span_of(batch, 2) if batch and batch[2] else None,
        step=span_of(step, 1),
    )
    if (
        batch is None
        and "/" in text
        and (count := _COUNT.search(text, epoch.end() if epoch else 0))
    ):
        total = span_of(count, 2, 4, 6)
        known = total is not None and text[slice(*total)] != "?"
        return where._replace(batch=span_of(count, 1, 3, 5), batches=total if known else None)
    return where


def names_settings(text: str) -> bool:
    """Whether a line lists the settings of a run, whose numbers are not places."""
    if (":" not in text and "=" not in text) or _CONFIG.search(text) is None:
        return False
    return not any(is_metric(name) and name.lower() != "lr" for name in _NAMES.findall(text))


def without_launcher(text: str) -> str:
    """Removes a launcher's prefix from a line."""
    return _without_launcher(text).lstrip() if _LAUNCHER.match(text) else text


def _without_launcher(text: str) -> str:
    end = 0
    for _ in range(4):
        prefix = _LAUNCHER.match(text, end)
        if prefix is None:
            break
        end = prefix.end()
    return " " * end + text[end:] if end else text


def _without_settings(text: str) -> str:
    if "(" in text and "=" in text:
        text = _CALL.sub(_blank_settings, text)
    return "" if names_settings(text) else text


def _blank_settings(call: re.Match[str]) -> str:
    names = _NAMES.findall(call[0])
    return call[0] if any(is_metric(n) and n.lower() != "lr" for n in names) else _blank(call)


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])


def _now(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The first match that is the current place, not the best epoch, a total, or a file name."""
    for match in pattern.finditer(text):
        if _NOT_NOW.search(text, max(0, match.start() - 12), match.start()):
            continue
        if _IN_FILE_NAME.match(text, match.end()):
            continue
        return match
    return None
