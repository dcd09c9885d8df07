"""Lines that people print: "epoch 3, batch 15: loss nan", "[3, 2000] loss: inf", and bars of tqdm.

Also timm, fairseq, Megatron, Keras and nanoGPT write lines that can be read so.
"""

from __future__ import annotations

import re
from collections import deque

from fastguard.commands.scan.reading import INT, Place, Reading
from fastguard.commands.scan.values import nonfinite_values

NAME = "plain"

# Bounded, so that no line takes long.
_GAP = r"[\s:=#\[(\"']{0,9}"
_MODE = r"(?:\(\w{1,9}\))?"  # Epoch(train) [3][ 100/1000], of mmengine
_EPOCH = re.compile(
    rf"\bep(?:och)?\b{_MODE}{_GAP}({INT}(?:\.\d+)?)(?:\s*/\s*({INT}))?", re.IGNORECASE
)
_BATCH = re.compile(rf"\b(?:mini)?batch\b{_GAP}({INT})(?:\s*/\s*({INT}))?", re.IGNORECASE)
_STEP = re.compile(
    rf"\b(?:global_step|step|iter|iteration|it|num_updates|update)\b{_MODE}{_GAP}({INT})",
    re.IGNORECASE,
)
_TUTORIAL = re.compile(rf"\s*\[({INT}),\s*({INT})\]")  # [epoch, batch], of PyTorch's tutorials
_COUNT = re.compile(
    rf"\[\s*({INT})\s*/\s*({INT})\b[^\]]{{0,40}}\]"  # [15/41]
    rf"|(?:^|[\s|:])({INT})/({INT}|\?)\s{{1,9}}[\[━╸]"  # 15/41 [, of tqdm and Keras
    rf"|:\s{{1,9}}({INT})\s{{0,9}}/\s{{0,9}}({INT})\s"  # epoch 003:     15 / 41, of fairseq
)
# 2026/11/21, 21/11/2026, and 11/21 if a time of day follows that is no clock of a bar,
# and no name stands before it: Epoch 11/12 03:00:10.
_DATE = re.compile(
    r"\b(?:\d{4}/\d\d?/\d\d?|\d\d?/\d\d?/\d{4}"
    r"|(?<![a-z] )(?<![a-z]: )(?:(?:0\d|1[0-2])/[0-3]\d|[0-3]\d/(?:0\d|1[0-2]))"
    r"(?=[ ,T]{1,3}[0-2]\d:[0-5]\d:[0-5]\d(?!\s{0,9}<)))\b"
)
_MEASURED = re.compile(
    r"(?:loss|norm|acc|accuracy|ppl|mse|mae|err|error)\w{0,40}[\"']?\s*[=:]?\s*[\"'(\[]*[+-]?\d",
    re.IGNORECASE,
)
_HAS_DIGIT = re.compile(r"\d")
LOSS_SCALE = "skipped because of loss_scale: "  # fastguard's own line: the gradients of no incident


class Plain:
    """Reads what nobody else does."""

    def read(self, text: str) -> Reading | None:
        """What a line says, or None if it says nothing of a run."""
        place = _place(text) if _HAS_DIGIT.search(text) else Place()
        if LOSS_SCALE in text:
            return Reading(NAME, place, measured=False)
        bad, _ = nonfinite_values(text)
        measured = bool(bad) or _MEASURED.search(text) is not None
        if not measured and place == Place():
            return None
        return Reading(NAME, place, bad, measured)


class Passed:
    """Good lines, of which the place is asked only when a bad one comes without its own.

    Reading each would take twenty times as long as passing it by. Kept are the last line that names
    an epoch and the last `KEPT` after it.
    """

    KEPT = 16

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=self.KEPT)
        self._with_epoch = ""

    def add(self, text: str) -> None:
        """Takes a line."""
        if "poch" in text or "EPOCH" in text or "ep " in text:
            if _EPOCH.search(text):
                self._lines.clear()
                self._with_epoch = text
                return
        self._lines.append(text)

    def place(self, last: Place) -> Place:
        """Where the lines ended, `last` being where they began; they are forgotten here."""
        if not self._with_epoch and not self._lines:
            return last
        for text in (self._with_epoch, *self._lines):
            last = _place(text).within(last)
        self._lines.clear()
        self._with_epoch = ""
        return last


def _place(text: str) -> Place:
    text = _DATE.sub("", text)
    if pair := _TUTORIAL.match(text):
        return Place(epoch=int(pair[1]), batch=int(pair[2]))
    epoch, batch, step = _EPOCH.search(text), _BATCH.search(text), _STEP.search(text)
    number = float(epoch[1]) if epoch else None
    place = Place(
        epoch=int(number) if number is not None and number.is_integer() else number,
        epochs=int(epoch[2]) if epoch and epoch[2] else None,
        batch=int(batch[1]) if batch else None,
        batches=int(batch[2]) if batch and batch[2] else None,
        step=int(step[1]) if step else None,
    )
    if batch is None and (count := _COUNT.search(text, epoch.end() if epoch else 0)):
        done, total = (group for group in count.groups() if group is not None)
        return Place(
            place.epoch,
            place.epochs,
            int(done),
            int(total) if total.isdigit() else None,
            place.step,
        )
    return place
