"""Whether a checkpoint file holds the weights of a model, or only what lies beside them.

Trainers write optimizers, schedules, random streams, histories and data into files of their own,
with the endings of checkpoints. None of them may take the place of weights. Nothing in a file says
"these are weights", so what is known not to be is left out: everything in the state dict of an
optimizer (found by its `param_groups`, wherever it stands and whatever a wrapper put beside them),
and everything under a name that says what else it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastguard.checkpoints.reading.named_leaves import named_leaves
from fastguard.checkpoints.reading.spans import Contents

_GROUPS = re.compile(r"(?:^|(?<=\.))param_groups\.")
_OF_AN_OPTIMIZER = {"state", "param_groups", "fastguard"}  # its state dict, plain or guarded
_BESIDE = re.compile(
    r"""
    .*optim.* | (?:lr_?)?sched.* | .*scaler.* | .*(?:rng|random).* | .*sampler.*
    | callbacks? | loops?
    | (?:.*_)?(?:loss|losses|metrics?|history|accuracy|lr|lrs|grad_norms?|steps?|epochs?|times?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
# What a tensor is whose own name it is, or one of a list; layers have such names too, and then
# there is a `weight` below.
_DATA = re.compile(
    r"""
    (?:.*_)?(?:data|dataset|[xy]|inputs?|targets?|labels?|images?|samples?|predictions?|preds?
    |outputs?|features?|logits|embeddings?)(?:\.\d+)* | [\d.]*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_STATES = re.compile(
    r"(?:.*\.)?(?:exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|square_avg|acc_delta|exp_inf|step)"
    r"(?:\..*)?"
)


def holds_weights(contents: Contents) -> bool:
    """Whether the file can be resumed from, or used, as a model."""
    names = [s.name for s in contents.spans if s.dtype.is_floating_point or s.dtype.is_complex]
    names += [name for name, array in contents.arrays if array.is_floating]
    optimizers = _optimizers(contents)
    return any(_may_be_a_weight(name, optimizers) for name in names)


def is_named_otherwise(path: Path) -> bool:
    """Whether the name of a file says that it holds no weights: `optimizer.pt`, `rng_state.pth`."""
    return any(_BESIDE.fullmatch(part) for part in re.split(r"[.\-]", path.name)[:-1])


def _optimizers(contents: Contents) -> set[str]:
    """What stands before `param_groups` in the names of each optimizer: `"optimizers.0."`."""
    found = set()
    for name, _ in named_leaves(contents.tree):
        match = _GROUPS.search(name)
        if match is not None:
            found.add(name[: match.start()])
    return found


def _may_be_a_weight(name: str, optimizers: set[str]) -> bool:
    first = name.partition(".")[0]
    if _BESIDE.fullmatch(first) or _DATA.fullmatch(name) or _STATES.fullmatch(name):
        return False
    if "" in optimizers and first in _OF_AN_OPTIMIZER:
        return False
    return not any(prefix and name.startswith(prefix) for prefix in optimizers)
