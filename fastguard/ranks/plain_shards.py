"""Detects shards stored in plain tensors, since ranks that hold shards must decide together.

A DTensor knows how its elements are distributed. FSDP1 and DeepSpeed store shards in plain tensors.
Without a group, each rank would clip by the norm of its own shards, and skip steps that other ranks
take. Shards are recognized by:

    FSDP1                     `_fsdp_flattened` on flat parameters and on the original ones
    DeepSpeed, stage 3        `ds_id` on parameters and on their float32 partitions
    DeepSpeed, stages 1, 2    no attribute; but the optimizer was created with parameters that have
                              `_hp_mapping`, and now holds fewer elements

With `ZeroRedundancyOptimizer`, each rank holds all gradients but updates only some of the
parameters, so a step must be taken by all ranks or by none.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from torch import Size, Tensor
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakIdKeyDictionary

from fastguard.errors.logger import log
from fastguard.ranks.groups import AS_TORCH, Group, Replicated, several_ranks

FSDP1, DEEPSPEED = "FullyShardedDataParallel", "DeepSpeed ZeRO"


def check_plain_shards(
    tensors: Sequence[Tensor],
    group: Group,
    replaced: Sequence[Tensor] | None = (),
    instead: str | None = None,
) -> None:
    """Raises an error for shards in plain tensors if the group of their ranks was not given.

    In functions patched by `patch_torch`, it only warns, once, since a trainer may combine the
    norms of the shards itself.

    Args:
        tensors: The tensors to guard or measure.
        group: See `Group`.
        replaced: Parameters that `tensors` have replaced. None: for functions called at every step;
            a list without shards is then not searched again. Default: ().
        instead: Advice for the error message if the caller cannot pass a group. Default: None.

    Raises:
        ValueError: Shards were found; the message says what to pass.
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
            f"group=Replicated(...) means that all ranks hold the same tensors, but the parameters "
            f"are shards of {kind} in plain tensors; {remedy}"
        )
    if instead is not None:
        remedy = instead
    elif kind == FSDP1:
        # With HYBRID_SHARD, all ranks together hold every element several times, once per replica.
        remedy = (
            "pass group=torch.distributed.group.WORLD; for HYBRID_SHARD, pass the process group "
            "that shards one replica; for NO_SHARD, pass "
            "fastguard.Replicated(torch.distributed.group.WORLD)"
        )
    raise ValueError(
        f"the parameters are shards of {kind} in plain tensors, so each rank would decide to clip "
        f"and skip from its own shards only; {remedy}"
    )


def check_sharded_optimizer(optimizer: object, group: Group) -> None:
    """Raises an error for a `ZeroRedundancyOptimizer` on several ranks without `Replicated`.

    Raises:
        ValueError: The message says what to pass.
    """
    sharded = any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)
    if sharded and several_ranks() and not isinstance(group, Replicated):
        raise ValueError(
            "ZeroRedundancyOptimizer updates different parameters on each rank, from gradients "
            "that all ranks hold, so all ranks must decide together; pass "
            "group=fastguard.Replicated(torch.distributed.group.WORLD)"
        )


_cleared = WeakIdKeyDictionary()
"""Lists in which no shards were found, as the length of the list by its first tensor."""


def is_managed(p: Tensor) -> bool:
    """Whether FSDP1 or DeepSpeed (stage 3) manages the memory of a parameter."""
    marks = getattr(p, "__dict__", {})
    return "_fsdp_flattened" in marks or "ds_id" in marks


def engine_of(tensors: Sequence[Tensor]) -> str | None:
    """Returns the engine that has split or flattened some of these tensors, or None."""
    managed = [t for t in tensors if is_managed(t)]
    if any(hasattr(t, "_unpadded_unsharded_size") for t in managed):
        return FSDP1
    if not managed or _is_cleared(tensors):
        return None
    kind = _kind(tensors, ())
    if kind is None:
        _cleared[tensors[0]] = len(tensors)
    return kind


def _is_cleared(tensors: Sequence[Tensor]) -> bool:
    """Whether an earlier call found no shards in this list."""
    return not tensors or _cleared.get(tensors[0]) == len(tensors)


def _kind(tensors: Sequence[Tensor], replaced: Sequence[Tensor]) -> str | None:
    """Returns the engine that has sharded these tensors, or None."""
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
    """Whether FSDP1 has split these tensors; with NO_SHARD it only flattens them."""
    flat = [t for t in flattened if hasattr(t, "_unpadded_unsharded_size")]
    if flat:
        return any(map(_is_split, flat))
    # The shard of an original parameter is a 1-d range of the flat parameter, possibly empty.
    ranges = [t for t in flattened if t.dim() == 1]
    if not ranges:
        return False
    # With NO_SHARD, a whole bias is 1-d too, so only flat parameters show whether it is split.
    flat = _flat_parameters_of(ranges)
    if flat:
        return any(map(_is_split, flat))
    return len(ranges) == len(flattened) or any(not t.numel() for t in ranges)


def _is_split(flat: Tensor) -> bool:
    whole: Size = flat._unpadded_unsharded_size  # type: ignore[attr-defined]
    return flat.numel() < whole.numel()


def _flat_parameters_of(originals: Sequence[Tensor]) -> list[Tensor]:
    """Returns the flat parameters of FSDP1 that contain one of these original parameters.

    Original parameters do not refer to their flat parameter, so the function searches all objects
    in memory (0.1 s for a million objects). After `gc.freeze`, it finds nothing.
    """
    wanted = set(map(id, originals))
    flat = (o for o in gc.get_objects() if issubclass(type(o), Tensor) and hasattr(o, "_params"))
    return [f for f in flat if not wanted.isdisjoint(map(id, f._params or ()))]


_warned: set[str] = set()


def _warn_of_local_norm(kind: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        log.warning(
            "torch.nn.utils was given shards of %s in plain tensors; as in torch, the norm covers "
            "only the shards of this rank",
            kind,
        )
