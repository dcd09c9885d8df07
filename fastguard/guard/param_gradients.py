"""Where the gradients of an optimizer are, step after step, as its param groups change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter, is_

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.functional.flat_buckets import FlatGradBuckets, check_flat
from fastguard.gradients.buckets import GradBuckets, bucketize
from fastguard.gradients.tensor_kinds import WRAPPED
from fastguard.guard.clip_scope import ClipScope, Layout, lay_out
from fastguard.guard.flat_checks import check_apart, check_flat_parameters
from fastguard.ranks.groups import Group, check_same_tensors
from fastguard.ranks.plain_shards import check_plain_shards
from fastguard.ranks.team import Team, team_of

log: logging.Logger = logging.getLogger("fastguard")


class Gradients:
    """The gradients of the parameters of an optimizer, in buckets.

    Args:
        optimizer: Its param groups say which parameters there are, now and later.
        scope: What one clip coefficient is for.
        names: Names by parameter.
        norm_type: The norm that will be taken.
        flat: Keep them in one buffer per (device, dtype).
        group: Whose gradients count beside those of this rank.
        with_parameters: The parameters are to be flat too, which implies `flat`.

    Attributes:
        layout: The parameters, their segments and names.
        device: Where the decision is to be taken.
        team: The ranks that decide together; None in one process.

    Raises:
        TypeError, ValueError: `group` is no group, or `flat` or `scope` do not go with it.
    """

    _seen = False  # that there are gradients, and where

    def __init__(
        self,
        optimizer: Optimizer,
        scope: ClipScope,
        names: Mapping[Tensor, str],
        norm_type: float,
        flat: bool,
        group: Group = None,
        with_parameters: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.scope: ClipScope = scope
        self.names = names
        self.norm_type = norm_type
        self.group: Group = group
        if scope in ("tensor", "unit"):
            check_same_tensors(group, f"clip_scope={scope!r}")
        self.layout: Layout = self._lay_out()
        check_plain_shards(self.layout.parameters, group)
        self.team: Team | None = team_of(self.layout.parameters, group)
        self.with_parameters = with_parameters
        if with_parameters:
            self.check_movable()
        self.flat = _flattened(self.layout) if flat or with_parameters else None

    def refresh(self) -> bool:
        """Looks whether the param groups hold other parameters than before; 0.03 µs a tensor."""
        groups = self.optimizer.param_groups
        known = self.layout.parameters
        if sum(len(g["params"]) for g in groups) == len(known) and all(
            map(is_, known, chain.from_iterable([g["params"] for g in groups]))
        ):
            return False
        layout = self._lay_out()
        check_plain_shards(layout.parameters, self.group, replaced=known)
        self.team = team_of(layout.parameters, self.group)
        if self.flat is not None:
            self.flat.release()
            # A gradient that is None stays so: a weight decay must not move its parameter now.
            self.flat = _flattened(layout, fill=False)
        self.layout = layout  # last: after an exception, all this is done again
        return True

    def check_new(self, named: Sequence[tuple[str | None, Tensor]]) -> None:
        """Raises a TypeError or ValueError for parameters that cannot join those that are there."""
        new = [p for _, p in named]
        check_plain_shards(new, self.group)
        if self.flat is None:
            return
        names = [self.names.get(p) or name or f"parameter {i}" for i, (name, p) in enumerate(named)]
        check_flat(new, names)
        if self.with_parameters:
            self.check_movable(new, names)

    def check_movable(self, new: Sequence[Tensor] = (), names: Sequence[str] = ()) -> None:
        """Raises a TypeError or ValueError if a parameter cannot move into a buffer, of those
        there are and of new ones with these names.
        """
        layout = self.layout
        known = dict(self.names)
        known.update(zip(layout.parameters, layout.names, strict=True))
        known.update(zip(new, names, strict=True))
        check_flat_parameters([*layout.parameters, *new], [*layout.names, *names])
        check_apart((name, p) for p, name in known.items())

    def buckets(self) -> GradBuckets:
        """The gradients of this step; on several ranks, partial ones are made whole.

        Raises:
            ValueError: They lie on the meta device, or are shards without a group.
            TypeError: They wrap other tensors.
        """
        if not self._seen:
            self._look()
        layout, team = self.layout, self.team
        sharing = None if team is None else team.sharing_of_gradients(layout.parameters)
        if self.flat is not None:
            buckets = self.flat.buckets()
            if sharing is None and buckets.device == self.device:
                return buckets
            return replace(buckets, device=self.device, sharing=sharing)
        buckets = bucketize(
            list(map(attrgetter("grad"), layout.parameters)),
            segments=layout.segments,
            n_segments=layout.n_segments,
            names=layout.names,
            norm_type=self.norm_type,
            device=self.device,
            sharing=sharing,
        )
        if buckets.kind is WRAPPED:
            self._refuse_layers(buckets)
        return buckets

    def _refuse_layers(self, buckets: GradBuckets) -> None:
        """One step cannot be taken in one layer and skipped in another."""
        kind = next(type(g).__name__ for b in buckets.buckets for g in b.grads)
        raise TypeError(
            f"the gradients are layers around other tensors (of type {kind}), which may hold "
            "several gradients at once, so that no one decision holds for them; guard the "
            "optimizer of plain tensors or DTensors, outside of torch.func"
        )

    def zero_(self, set_to_none: bool) -> None:
        """Clears them: one fill a flat buffer, else what the optimizer does."""
        if self.flat is not None:
            self.flat.zero_()
        elif set_to_none:
            self.optimizer.zero_grad()  # some take no argument
        else:
            self.optimizer.zero_grad(set_to_none=False)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives now (`model.to("cuda")` after the guard was made);
        without one, where the ranks meet.

        The meta device holds no numbers: until the model has memory, the guard is on the CPU.
        """
        cpu = torch.device("cpu")
        if self.layout.parameters:
            first = self.layout.parameters[0]
            return cpu if first.is_meta else first.device
        return cpu if self.team is None else self.team.device_for(cpu)

    def _look(self) -> None:
        """Once: are there gradients, do they hold numbers, and are they whole?

        FSDP1 with `use_orig_params=True` may cut up parameters that an optimizer has already.
        """
        check_plain_shards(self.layout.parameters, self.group)
        with_grad = [
            (name, p.grad.is_meta)
            for name, p in zip(self.layout.names, self.layout.parameters, strict=True)
            if p.grad is not None
        ]
        for name, is_meta in with_grad:
            if is_meta:
                raise ValueError(
                    f"the gradient of {name} lies on the meta device, which holds no numbers; give "
                    "the model its memory first: model.to_empty(device=...), its weights, then the "
                    "optimizer"
                )
        self._seen = True
        if with_grad or self.team is not None:  # other ranks may hold them all
            return
        if any(p.is_meta for p in self.layout.parameters):
            log.warning(
                "no parameter has a gradient at the first step: they are on the meta device still, "
                "so they are not those of the model any more and nothing is trained; make the "
                "optimizer after model.to_empty(device=...), which replaces them"
            )
        else:
            log.warning(
                "no parameter has a gradient at the first step, so nothing is trained; is "
                "loss.backward() called before it, and does the optimizer hold the parameters of "
                "the model?"
            )

    def _lay_out(self) -> Layout:
        return lay_out(self.optimizer.param_groups, self.scope, self.names)


def _flattened(layout: Layout, *, fill: bool = True) -> FlatGradBuckets:
    named = zip(layout.names, layout.parameters, strict=True)
    return FlatGradBuckets(named, segments=layout.segments, n_segments=layout.n_segments, fill=fill)
