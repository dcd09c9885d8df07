"""Shards that look like any other tensor: a rank that holds some must not decide alone.

A DTensor says where its elements lie. FSDP1 and DeepSpeed keep shards in plain tensors; each rank
would clip by the norm of its own shards, and skip a step that the others take. What marks them:

    FSDP1                     `_fsdp_flattened` on flat parameters and on the original ones
    DeepSpeed, stage 3        `ds_id` on parameters and on their float32 partitions
    DeepSpeed, stages 1, 2    nothing, but the optimizer was made with parameters that carry
                              `_hp_mapping`, and holds fewer elements now

`ZeroRedundancyOptimizer` has whole gradients on each rank, but each rank updates a part of the
parameters: a step must be taken by all ranks or by none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakIdKeyDictionary

from fastguard.ranks.groups import AS_TORCH, Group, Replicated, several_ranks

log = logging.getLogger("fastguard")

FSDP1, DEEPSPEED = "FullyShardedDataParallel", "DeepSpeed ZeRO"


def check_plain_shards(
    tensors: Sequence[Tensor],
    group: Group,
    replaced: Sequence[Tensor] | None = (),
    instead: str | None = None,
) -> None:
    """Refuses shards in plain tensors without a group of the ranks that hold them.

    Through `patch_torch`, where a trainer may join the norms of shards itself, it warns once.

    Args:
        tensors: What is to be guarded or measured.
        group: See `Group`.
        replaced: Parameters whose place `tensors` have taken; None: a function asks at every step,
            and a list that had no shards is not looked through again.
        instead: What to do where no group can be passed.

    Raises:
        ValueError: Naming what to pass.
    """
    if isinstance(group, ProcessGroup) or not several_ranks():
        return
    if replaced is None and (_is_cleared(tensors) or (group is AS_TORCH and _warned)):
        return
    kind = _kind(tensors, replaced or ())
    if kind is None:
        if replaced is None and tensors:
            _cleared[tensors[0]] = len(tensors)
        return
    if group is AS_TORCH:
        _warn_of_local_norm(kind)
        return
    remedy = "pass group=torch.distributed.group.WORLD, or the process group of the shards"
    if isinstance(group, Replicated):
        raise ValueError(
            f"group=Replicated(...) says that all ranks hold the same tensors, but the parameters "
            f"are shards of {kind} in plain tensors; {remedy}"
        )
    if instead is not None:
        remedy = instead
    elif kind == FSDP1:
        # With HYBRID_SHARD all ranks together hold each element once per replica.
        remedy = (
            "pass group=torch.distributed.group.WORLD, with HYBRID_SHARD the process group that "
            "shards one replica, with NO_SHARD fastguard.Replicated(torch.distributed.group.WORLD)"
        )
    raise ValueError(
        f"the parameters are shards of {kind} in plain tensors, so each rank would clip and skip "
        f"by its own shards alone; {remedy}"
    )


def check_sharded_optimizer(optimizer: object, group: Group) -> None:
    """Refuses a `ZeroRedundancyOptimizer` of several ranks without `Replicated`.

    Raises:
        ValueError: Naming what to pass.
    """
    sharded = any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)
    if sharded and several_ranks() and not isinstance(group, Replicated):
        raise ValueError(
            "ZeroRedundancyOptimizer updates other parameters on each rank, from gradients that "
            "all ranks hold, so all of them must decide together; pass "
            "group=fastguard.Replicated(torch.distributed.group.WORLD)"
        )


_cleared = WeakIdKeyDictionary()
"""The first tensor of lists without shards, and how many they had."""


def is_managed(p: Tensor) -> bool:
    """Whether FSDP1 or DeepSpeed (stage 3) decides where the memory of a parameter is."""
    marks = getattr(p, "__dict__", {})
    return "_fsdp_flattened" in marks or "ds_id" in marks


def _is_cleared(tensors: Sequence[Tensor]) -> bool:
    """Whether a list was looked through before: the functions are called with it at every step."""
    return not tensors or _cleared.get(tensors[0]) == len(tensors)


def _kind(tensors: Sequence[Tensor], replaced: Sequence[Tensor]) -> str | None:
    """What sharded these tensors; None: nothing is known of it."""
    marks = [getattr(t, "__dict__", {}) for t in tensors]
    flattened = [t for t, marks_ in zip(tensors, marks, strict=True) if "_fsdp_flattened" in marks_]
    if flattened and _are_flat_shards(flattened):
        return FSDP1
    if any("ds_id" in marks_ for marks_ in marks):
        return DEEPSPEED
    if any(getattr(t, "_hp_mapping", None) is not None for t in replaced) and (
        sum(t.numel() for t in tensors) < sum(t.numel() for t in replaced)
    ):
        return DEEPSPEED
    return None


def _are_flat_shards(flattened: Sequence[Tensor]) -> bool:
    """Whether FSDP1 has cut these up: with NO_SHARD it flattens them only."""
    whole = [getattr(t, "_unpadded_unsharded_size", None) for t in flattened]
    if any(size is not None for size in whole):  # flat parameters
        return any(
            size is not None and t.numel() < size.numel()
            for t, size in zip(flattened, whole, strict=True)
        )
    # Original parameters: a shard is a stretch of the flat one, or empty, whatever shape it had.
    return any(not t.numel() for t in flattened) or all(t.dim() == 1 for t in flattened)


_warned: set[str] = set()


def _warn_of_local_norm(kind: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        log.warning(
            "torch.nn.utils was given shards of %s in plain tensors: as in torch, the norm is that "
            "of the shards of this rank",
            kind,
        )
