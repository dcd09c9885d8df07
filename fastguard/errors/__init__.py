"""The two errors that can end a guarded run, and functions that list names in messages.

Both errors are `RuntimeError`s, so that code written for `torch.nn.utils.clip_grad_norm_(...,
error_if_nonfinite=True)` still catches them. Both list the bad parameters with their counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from fastguard.errors.plain_text import printable

Culprit = tuple[str, int, int, int]
"""`(parameter name, NaN elements, +Inf elements, -Inf elements)`."""

NAMED_CULPRITS = 8
"""Number of parameters that an error or a record lists; further ones are only counted."""

MAX_NAME_LENGTH = 400
"""Maximum number of characters of a name in a message."""


def describe_culprits(culprits: Sequence[Culprit], n_culprits: int | None = None) -> str:
    """Formats bad parameters: `layer.3.weight (2 NaN, 1 +Inf), head.bias (4 NaN) and 12 more`."""
    total = len(culprits) if n_culprits is None else n_culprits
    named = []
    for name, nan, posinf, neginf in culprits[:NAMED_CULPRITS]:
        counts = [
            f"{n} {kind}" for n, kind in ((nan, "NaN"), (posinf, "+Inf"), (neginf, "-Inf")) if n
        ]
        named.append(f"{printable(name, MAX_NAME_LENGTH)} ({', '.join(counts)})")
    return several(named, NAMED_CULPRITS, total)


def plural(n: int, noun: str) -> str:
    """Formats a count: `1 step`, `12,000 steps`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def several(names: Sequence[str], n: int = 3, total: int | None = None) -> str:
    """Lists the first names, and the number of further names.

    Args:
        names: The names, or the first of them.
        n: Number of names to list.
        total: Number of all names. Default: the length of `names`.

    Example:
        >>> several(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = (len(names) if total is None else total) - len(names[:n])
    return ", ".join(names[:n]) + (f" and {more} more" if more > 0 else "")


def nearest(key: str, valid: Collection[str]) -> str:
    """Returns a hint for an error about an invalid name: the most similar valid name, or a list."""
    return did_you_mean(key, valid) or f"; valid are {', '.join(list(valid)[:12])}"


def did_you_mean(key: str, valid: Collection[str]) -> str:
    """Returns a hint with the most similar valid name; empty if there is none.

    Example:
        >>> did_you_mean("monitr", ["report", "monitor"]), did_you_mean("train", ["report"])
        ("; did you mean 'monitor'?", '')
    """
    near = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


class _ErrorWithCulprits(RuntimeError):
    def __init__(self, message: str, culprits: Sequence[Culprit] = ()) -> None:
        super().__init__(printable(message))
        self.culprits: list[Culprit] = list(culprits)


class NonFiniteGradError(_ErrorWithCulprits):
    """Gradients or a loss contain NaN or Inf, and the caller asked for an error.

    Attributes:
        culprits: `(name, nan, posinf, neginf)` of each bad parameter, in parameter order; empty if
            only a loss is bad.
    """


class TrainingDivergedError(_ErrorWithCulprits):
    """Training cannot continue: the budget of skipped steps or of rollbacks is used up.

    Attributes:
        culprits: `(name, nan, posinf, neginf)` of the bad parameters of the last incident, if any.
    """
