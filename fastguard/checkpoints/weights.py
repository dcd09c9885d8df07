"""Decides whether a checkpoint file holds model weights.

Trainers also save optimizers, schedules, random states, histories and data in files with
checkpoint suffixes. Such a file must not replace a checkpoint of the weights. File formats do not
mark weights, so this module excludes tensors that are known to be something else: the contents of
an optimizer's state dict (recognized by its `param_groups`, at any depth), and tensors with names
such as `scheduler`, `rng_state` or `loss`. If any other floating-point tensor remains, the file
contains weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastguard.checkpoints.reading.named_leaves import named_leaves
from fastguard.checkpoints.reading.spans import Contents

_GROUPS = re.compile(r"(?:^|(?<=\.))param_groups\.")
# keys of an optimizer's state dict, plain or guarded
_OPTIMIZER_KEYS = {"state", "param_groups", "fastguard"}
# names at the top level, or of files, that are not names of weights
_NON_WEIGHT_NAMES = re.compile(
    r"""
    .*optim.* | (?:lr_?)?sched.* | .*scaler.* | .*(?:rng|random).* | .*sampler.*
    | callbacks? | loops?
    | (?:.*_)?(?:loss|losses|metrics?|history|accuracy|lr|lrs|grad_norms?|steps?|epochs?|times?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Names of data tensors and of lists of them. A layer can have such a name too, but the names of its
# tensors are longer: `outputs.weight`.
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
    """Whether the file contains model weights."""
    names = [s.name for s in contents.spans if s.dtype.is_floating_point or s.dtype.is_complex]
    names += [name for name, array in contents.arrays if array.is_floating]
    optimizers = _optimizers(contents)
    return any(_may_be_a_weight(name, optimizers) for name in names)


def name_rules_out_weights(path: Path) -> bool:
    """Whether the file name rules out weights, as do `optimizer.pt` and `rng_state.pth`."""
    return any(_NON_WEIGHT_NAMES.fullmatch(part) for part in re.split(r"[.\-]", path.name)[:-1])


def _optimizers(contents: Contents) -> set[str]:
    """Returns the path prefix of each optimizer's state dict, such as `"optimizers.0."`."""
    found = set()
    for name, _ in named_leaves(contents.tree):
        match = _GROUPS.search(name)
        if match is not None:
            found.add(name[: match.start()])
    return found


def _may_be_a_weight(name: str, optimizers: set[str]) -> bool:
    first = name.partition(".")[0]
    if _NON_WEIGHT_NAMES.fullmatch(first) or _DATA.fullmatch(name) or _STATES.fullmatch(name):
        return False
    if "" in optimizers and first in _OPTIMIZER_KEYS:
        return False
    return not any(prefix and name.startswith(prefix) for prefix in optimizers)
