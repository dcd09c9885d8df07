"""Decides whether a checkpoint file holds model weights.

Trainers also save optimizers, schedules, random states, histories and data in files with
checkpoint suffixes. Such a file must not replace a checkpoint of the weights. File formats do not
mark weights, so this module excludes tensors that are known to be something else: the contents of
an optimizer's state dict (recognized by its `param_groups`, at any depth), and tensors with names
such as `scheduler`, `rng_state` or `loss`. Single numbers, such as the scale of a gradient scaler,
do not count either. If any other floating-point tensor remains, the file contains weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastguard.checkpoints.reading.named_leaves import owned_leaves
from fastguard.checkpoints.reading.spans import Contents

_GROUPS = re.compile(r"(?:^|(?<=\.))param_groups\.")
# keys of an optimizer's state dict, plain or guarded
_OPTIMIZER_KEYS = {"state", "param_groups", "fastguard"}
# names at the top level, or of files, that are not names of weights
_NON_WEIGHT_NAMES = re.compile(
    r"""
    .*optim.* | (?:lr_?)?sched.* | .*scaler.* | .*(?:rng|random).* | .*sampler.*
    | callbacks? | loops? | fastguard
    | (?:.*_)?(?:loss|losses|metrics?|history|accuracy|lr|lrs|grad_norms?|steps?|epochs?|times?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Names of data tensors, histories, and lists of them. A layer can have such a name too, but its
# tensors have longer names: `outputs.weight`.
_DATA = re.compile(
    r"""
    (?:.*_)?(?:data|dataset|[xy]|inputs?|targets?|labels?|images?|samples?|predictions?|preds?
    |outputs?|features?|logits|embeddings?|train|val|valid|validation|test)(?:\.\d+)* | [\d.]*
    | (?:[^.]*_)?(?:loss|losses|metrics?|hist|history|acc|accuracy|scores?|rewards?|curves?|logs?)
    (?:_[^.]*)?(?:\.\d+)*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_STATES = re.compile(
    r"(?:.*\.)?(?:exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|square_avg|acc_delta|exp_inf|step)"
    r"(?:_\d+)?(?:\..*)?"
)


def holds_weights(contents: Contents) -> bool:
    """Whether the file contains model weights."""
    spans = [s for s in contents.spans if s.dtype.is_floating_point or s.dtype.is_complex]
    names = [s.name for s in spans if not _is_number(s.size)]
    names += [
        n for n, array in contents.arrays if array.is_floating and not _is_number(array.shape)
    ]
    in_optimizers = _names_in_optimizers(contents)
    return any(name not in in_optimizers and _may_be_a_weight(name) for name in names)


def name_rules_out_weights(path: Path) -> bool:
    """Whether the file name rules out weights, as do `optimizer.pt` and `rng_state.pth`."""
    return any(_NON_WEIGHT_NAMES.fullmatch(part) for part in re.split(r"[.\-]", path.name)[:-1])


def _names_in_optimizers(contents: Contents) -> set[str]:
    """Returns the names of the values in the state dicts of optimizers, at any depth."""
    found: set[str] = set()
    prefixes: set[str] = set()
    names: list[str] = []
    for name, _, owners in owned_leaves(contents.tree):
        names.append(name)
        if match := _GROUPS.search(name):  # names that were flattened
            prefixes.add(name[: match.start()])
        if any(isinstance(owner, dict) and "param_groups" in owner for owner in owners[1:]):
            found.add(name)
    if isinstance(contents.tree, dict) and "param_groups" in contents.tree:
        prefixes.add("")
    for name in names:
        if "" in prefixes and name.partition(".")[0] in _OPTIMIZER_KEYS:
            found.add(name)
    nested = tuple(prefixes - {""})
    return found | {name for name in names if nested and name.startswith(nested)}


def _is_number(shape: tuple[int, ...]) -> bool:
    return shape in ((), (1,))


def _may_be_a_weight(name: str) -> bool:
    first = name.partition(".")[0]
    return not (
        _NON_WEIGHT_NAMES.fullmatch(first) or _DATA.fullmatch(name) or _STATES.fullmatch(name)
    )
