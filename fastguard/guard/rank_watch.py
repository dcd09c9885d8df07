"""`RankWatch`: finds the rank on which a bad gradient originated, before ranks reduce gradients.

After the reduction, a NaN that one rank produced is on every rank (DDP), or on the rank that owns
the shard (FSDP2). Gradients are therefore measured before the reduction:

    DDP     in a communication hook, bucket by bucket, just before the all-reduce
    FSDP2   as autograd produces them, about 25 MB at a time, before the reduce-scatter

Cost: another read of every local gradient in each backward pass, and 25 MB of memory. With FSDP2
these are the unsharded gradients: with n shards, a rank reads n times as much as the guard does.
The watch adds no collective, only one number to the vector that the ranks exchange anyway, and it
never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastguard.errors.plain_text import shown
from fastguard.gradients.buckets import bucketize
from fastguard.gradients.transfer import moved, numbers_on
from fastguard.stages.contract import Signals
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure

if TYPE_CHECKING:
    from torch.distributed import GradBucket
    from torch.utils.hooks import RemovableHandle

    from fastguard.guard.guarded import GuardedOptimizer

CommHook = Callable[[Any, "GradBucket"], "torch.futures.Future[Tensor]"]

FLUSH_BYTES = 25 * 2**20
"""FSDP2: size of the gradients that are measured in one call, equal to DDP's bucket size."""


class RankWatch:
    """Makes records name the rank on which a bad gradient originated.

    `record.culprit_rank` is then this rank, or None if there were several; `record.culprit_ranks`
    is their number (0: the reduction itself overflowed). On each of these ranks, `record.culprits`
    are the bad parameters with their counts before the reduction. The watch costs another read of
    every local gradient, so use it in runs that have had a NaN. With DDP, accumulate gradients
    under `no_sync()`; otherwise the gradient of an earlier micro-batch has already been reduced,
    and counts as bad on every rank.

    Args:
        optimizer: The guarded optimizer, which decides over several ranks (`group=` or DTensors).
        model: The model: `DistributedDataParallel`, or a module with `fully_shard` applied.
        comm_hook: For DDP, the hook that reduces a bucket, `hook(state, bucket) -> Future`, as in
            `register_comm_hook`; None: an all-reduce that computes the mean. DDP accepts only one
            hook, which cannot be removed.
        comm_state: The state for `comm_hook`; None: the process group of the model.

    Raises:
        TypeError, ValueError: An argument has the wrong type; nothing was changed.

    Example:
        >>> import torch, torch.distributed as dist, fastguard
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
        >>> opt = fastguard.GuardedOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     group=fastguard.Replicated(dist.group.WORLD),
        ... )
        >>> watch = fastguard.RankWatch(opt, model)
        >>> model(torch.full((1, 2), float("nan"))).sum().backward()
        >>> opt.step()
        >>> opt.records()[0].action
        'skipped'
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        optimizer: GuardedOptimizer,
        model: nn.Module,
        *,
        comm_hook: CommHook | None = None,
        comm_state: Any = None,
    ) -> None:
        from fastguard.guard.guarded import GuardedOptimizer

        if not isinstance(optimizer, GuardedOptimizer):
            raise TypeError(f"optimizer={shown(optimizer)} must be a fastguard.GuardedOptimizer")
        self._optimizer = optimizer
        self._table: Tensor | None = None
        self._squared_norm: Tensor | None = None
        self._waiting: list[tuple[int, Tensor]] = []
        self._bytes = 0
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[str, Tensor] = {}
        self._index_of = {
            id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])
        }
        units = [module for module in model.modules() if _is_unit(module)]
        if isinstance(model, DistributedDataParallel):
            self._watch_ddp(model, comm_hook, comm_state)
        elif not units:
            raise ValueError(
                f"model is a {type(model).__name__}, but RankWatch supports only "
                "DistributedDataParallel and modules with fully_shard; pass one of these"
            )
        elif comm_hook is not None:
            raise ValueError(
                f"model is a {type(model).__name__} with fully_shard, but comm_hook is only for "
                "DistributedDataParallel; leave out comm_hook"
            )
        else:
            for unit in units:
                self._watch_unit(unit)
        optimizer.rank_watch = self

    def remove(self) -> None:
        """Ends the watch. The communication hook of a DDP model remains, but only reduces."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._waiting.clear()
        if self._optimizer.rank_watch is self:
            self._optimizer.rank_watch = None

    def with_origins(self, stats: GradStats, signals: Signals) -> tuple[GradStats, Signals]:
        """Adds what the watch found since the last step to stats and signals of this rank."""
        self._flush()
        self._squared_norm = None
        table, self._table = self._table, None
        if table is None:
            return stats, replace(signals, local_nonfinite=torch.zeros_like(stats.summary[0, 0]))
        table = moved(table, stats.counts.device)
        counts = torch.maximum(stats.counts, table.to(stats.counts.dtype))
        return replace(stats, counts=counts), replace(signals, local_nonfinite=table.sum().double())

    def take_squared_norm(self) -> Tensor | None:
        """Returns and resets the squared norm of this rank's gradients since the last step.

        Returns:
            float64 `()`: computed from the finite elements, with the loss scale. None: there was no
            backward pass.
        """
        self._flush()
        squared, self._squared_norm = self._squared_norm, None
        return squared

    # DDP.

    def _watch_ddp(
        self, model: DistributedDataParallel, comm_hook: CommHook | None, comm_state: Any
    ) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self._reduce: CommHook = comm_hook or allreduce_hook
        state = model.process_group if comm_hook is None else comm_state
        model.register_comm_hook(state, self._before_all_reduce)

    # no annotations: DDP refuses annotations that are strings
    def _before_all_reduce(self, state, bucket):
        if self._optimizer.rank_watch is self:
            indices = [self._index_of.get(id(p)) for p in bucket.parameters()]
            found = zip(indices, bucket.gradients(), strict=True)
            self._measure([(i, grad) for i, grad in found if i is not None])
        return self._reduce(state, bucket)

    # FSDP2: the forward pre-hook of a unit unshards its parameters, and their gradients are reduced
    # after the backward pass has left the unit.

    def _watch_unit(self, unit: nn.Module) -> None:
        managed = [
            (f"{id(module)}.{name}", module, name, self._index_of.get(id(p)))
            for module in _of_unit(unit)
            for name, p in module.named_parameters(recurse=False)
        ]
        mine = [(key, module, name, i) for key, module, name, i in managed if i is not None]
        self._handles.append(unit.register_forward_pre_hook(partial(self._hook_whole, mine)))

    def _hook_whole(self, managed: Iterable[tuple[str, nn.Module, str, int]], *_: Any) -> None:
        for key, module, name, i in managed:
            parameter = getattr(module, name)
            if self._hooked.get(key) is parameter or not parameter.requires_grad:
                continue
            self._hooked[key] = parameter
            hook = partial(self._collect, i)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def _collect(self, i: int, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        self._waiting.append((i, grad))
        self._bytes += grad.nbytes
        if self._bytes >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if waiting:
            self._measure(waiting)

    @torch.no_grad()
    def _measure(self, gradients: Sequence[tuple[int, Tensor]]) -> None:
        """Adds the counts of some gradients to the table, int64 `(3, T)`.

        The counts of a parameter describe its first bad gradient in the step, because later
        gradients may be sums over ranks.
        """
        if not gradients:
            return
        indices, grads = zip(*gradients, strict=True)
        stats = measure(bucketize([g.detach() for g in grads]))
        counts, squared = stats.counts.long(), stats.power_sum.sum()
        known = self._squared_norm
        self._squared_norm = squared if known is None else known + moved(squared, known.device)
        if self._table is None:
            n = sum(len(group["params"]) for group in self._optimizer.param_groups)
            self._table = torch.zeros(3, n, dtype=torch.int64, device=counts.device)
        at = numbers_on(indices, counts.device, torch.int64)
        before = self._table[:, at]
        self._table[:, at] = torch.where(before.sum(0) > 0, before, counts)


def _is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` gathers and reduces the parameters of this module together."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _of_unit(unit: nn.Module) -> Iterable[nn.Module]:
    """Yields the modules whose parameters are gathered together with `unit`."""
    yield unit
    for child in unit.children():
        if not _is_unit(child):
            yield from _of_unit(child)
