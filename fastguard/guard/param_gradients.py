"""`Gradients`: the gradients of an optimizer in buckets, following changes of its param groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter, is_
from typing import Literal, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastguard.errors.logger import log
from fastguard.functional.flat_buckets import FlatGradBuckets
from fastguard.functional.flat_layout import check_flat, has_slot
from fastguard.gradients.buckets import GradBuckets, bucketize
from fastguard.gradients.tensor_kinds import WRAPPED
from fastguard.guard.clip_scope import ClipScope, Layout, lay_out
from fastguard.guard.flat_checks import check_apart, check_flat_parameters
from fastguard.guard.own_backward import holds_a_model
from fastguard.ranks.groups import Group, check_same_tensors
from fastguard.ranks.plain_shards import check_plain_shards
from fastguard.ranks.team import Team, team_of

CPU = torch.device("cpu")
TRUSTED = "trusted"
Flat = bool | Literal["trusted"]


class Gradients:
    """The gradients of the parameters of an optimizer, in buckets.

    Args:
        optimizer: The optimizer; its param groups may change between steps.
        scope: What one clip coefficient applies to.
        names: Names by parameter.
        norm_type: p of the norm.
        flat: Whether to keep gradients in one buffer per (device, dtype). `"trusted"`: they are
            never replaced.
        group: The ranks that decide together.
        with_parameters: Whether parameters will be flat too, which implies `flat`. `"trusted"`:
            neither parameters nor gradients are replaced.

    Attributes:
        layout: The parameters, their segments and names.
        device: The device of the decision.
        team: The ranks that decide together; None in a single process.
        trusted: Whether a step checks only a share of the flat gradients.
        turn: The number of such checks so far, which selects the share.

    Raises:
        TypeError, ValueError: `group` is not a process group, or cannot be combined with `flat` or
            `scope`.
    """

    _seen = False  # whether the gradients have been checked, which happens in the first step

    def __init__(
        self,
        optimizer: Optimizer,
        scope: ClipScope,
        names: Mapping[Tensor, str],
        norm_type: float,
        flat: Flat,
        group: Group = None,
        with_parameters: Flat = False,
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
        self.with_parameters: bool = bool(with_parameters)
        self.trusted: bool = (with_parameters or flat) == TRUSTED
        self.turn: int = 0
        if with_parameters:
            self.check_movable()
        self.flat = self._flattened(self.layout) if flat or with_parameters else None
        self._know_groups()

    def refresh(self) -> bool:
        """Updates the layout if the parameters have changed; checking takes 0.001 µs per tensor.

        Returns:
            Whether they have changed.
        """
        known = self.layout.parameters
        if self._holds_known([g["params"] for g in self.optimizer.param_groups]):
            return False
        layout = self._lay_out()
        check_plain_shards(layout.parameters, self.group, replaced=known)
        self.team = team_of(layout.parameters, self.group)
        if self.flat is not None:
            self.flat.release()
            # A gradient that is None remains None, so that weight decay does not change its
            # parameter. Trusted gradients are always in their slots, so they are never None.
            self.flat = self._flattened(layout, fill=self.trusted)
        self.layout = layout  # set last, so that all of this is repeated after an exception
        self._know_groups()
        return True

    def _holds_known(self, groups: list[list[Tensor]]) -> bool:
        """Returns whether the param groups contain the known parameters.

        Lists of the same objects compare equal without access to the objects, 20 times faster than
        `is` per tensor. Two different tensors can only compare equal if they have one element; with
        more elements, the comparison raises an error.
        """
        try:
            if groups == self._groups:
                scalars = self._scalars
                return not scalars or all(groups[g][i] is p for g, i, p in scalars)
        except Exception:  # comparing two different tensors raised an error
            pass
        known = self.layout.parameters
        return sum(map(len, groups)) == len(known) and all(
            map(is_, known, chain.from_iterable(groups))
        )

    def check_new(self, named: Sequence[tuple[str | None, Tensor]]) -> None:
        """Raises a TypeError or ValueError for new parameters that cannot be added."""
        new = [p for _, p in named]
        check_plain_shards(new, self.group)
        if self.flat is None:
            return
        names = [self.names.get(p) or name or f"parameter {i}" for i, (name, p) in enumerate(named)]
        check_flat(new, names)
        if self.with_parameters:
            self.check_movable(new, names)

    def check_movable(self, new: Sequence[Tensor] = (), names: Sequence[str] = ()) -> None:
        """Raises a TypeError or ValueError if a current or new parameter cannot move into a buffer.

        Args:
            new: New parameters.
            names: Their names.
        """
        layout = self.layout
        known = dict(self.names)
        known.update(zip(layout.parameters, layout.names, strict=True))
        known.update(zip(new, names, strict=True))
        check_flat_parameters([*layout.parameters, *new], [*layout.names, *names])
        check_apart((name, p) for p, name in known.items())

    def buckets(self) -> GradBuckets:
        """Returns the gradients of this step; on several ranks, `Partial` DTensors are reduced.

        Raises:
            ValueError: Gradients are on the meta device, or are shards without a group.
            TypeError: Gradients are subclasses that wrap other tensors.
            RuntimeError: A trusted gradient was replaced.
        """
        if not self._seen:
            self._check_first_step()
        layout, team = self.layout, self.team
        sharing = None if team is None else team.sharing_of_gradients(layout.parameters)
        if self.flat is not None:
            if self.trusted:
                self._check_share(self.flat)
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
            self._refuse_wrapped(buckets)
        return buckets

    def _check_share(self, flat: FlatGradBuckets) -> None:
        """Checks the next share of the parameters; raises a RuntimeError if one was replaced."""
        self.turn += 1
        replaced = flat.replaced(self.turn)
        if replaced is not None:
            self.refuse_replaced(replaced)

    def refuse_replaced(self, p: Tensor) -> NoReturn:
        """Raises a RuntimeError for a trusted parameter that is not in its buffer."""
        layout = self.layout
        named = zip(layout.names, layout.parameters, strict=True)
        name = next(name for name, q in named if q is p)
        argument = "flat_parameters" if self.with_parameters else "flat_buckets"
        raise RuntimeError(
            f"{name} or its gradient was replaced, frozen or unfrozen, which "
            f"{argument}={TRUSTED!r} does not allow; clear gradients with the zero_grad() of the "
            f"guard, or pass {argument}=True, which checks every parameter in every step"
        )

    def _refuse_wrapped(self, buckets: GradBuckets) -> None:
        """Raises a TypeError, since gradients that wrap several tensors need several decisions."""
        kind = next(type(g).__name__ for b in buckets.buckets for g in b.grads)
        raise TypeError(
            f"the gradients wrap other tensors (type {kind}) and may hold several gradients at "
            "once, so a single decision does not suffice; guard an optimizer of plain tensors or "
            "DTensors, outside of torch.func"
        )

    def zero_(self, set_to_none: bool) -> None:
        """Clears the gradients: one fill per flat buffer, or `zero_grad` of the optimizer."""
        if self.flat is not None:
            self.flat.zero_()
        elif set_to_none:
            self.optimizer.zero_grad()  # some optimizers take no argument here
        else:
            self.optimizer.zero_grad(set_to_none=False)

    @property
    def device(self) -> torch.device:
        """The current device of the first parameter, which `model.to` may change.

        Without parameters: the device of the collectives. If the model is on the meta device, which
        holds no values: the CPU.
        """
        if self.layout.parameters:
            first = self.layout.parameters[0]
            return CPU if first.is_meta else first.device
        return CPU if self.team is None else self.team.device_for(CPU)

    def _check_first_step(self) -> None:
        """Checks in the first step that gradients exist, have values, and are no plain shards.

        FSDP1 with `use_orig_params=True` may shard parameters after the optimizer was created.

        Raises:
            ValueError: A gradient is on the meta device, or parameters are shards without a group.
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
                    f"the gradient of {name} is on the meta device, which holds no values; call "
                    "model.to_empty(device=...) and load the weights before creating the optimizer"
                )
        self._seen = True
        # Other ranks may hold all gradients, or the optimizer may compute them in its step.
        if with_grad or self.team is not None or holds_a_model(self.optimizer):
            return
        if any(p.is_meta for p in self.layout.parameters):
            log.warning(
                "no parameter has a gradient in the first step, so nothing is trained: the "
                "parameters of the optimizer are on the meta device and no longer belong to the "
                "model; create the optimizer after model.to_empty(device=...), which replaces the "
                "parameters"
            )
        else:
            log.warning(
                "no parameter has a gradient in the first step, so nothing is trained; check that "
                "loss.backward() is called before the step, and that the optimizer holds the "
                "parameters of the model"
            )

    def _lay_out(self) -> Layout:
        return lay_out(self.optimizer.param_groups, self.scope, self.names)

    def _know_groups(self) -> None:
        """Stores the parameters of the param groups, for `_holds_known`."""
        self._groups = [list(group["params"]) for group in self.optimizer.param_groups]
        self._scalars = [
            (g, i, p)
            for g, params in enumerate(self._groups)
            for i, p in enumerate(params)
            if is_lazy(p) or p.numel() == 1
        ]

    def _flattened(self, layout: Layout, *, fill: bool = True) -> FlatGradBuckets:
        return FlatGradBuckets(
            zip(layout.names, layout.parameters, strict=True),
            trusted=self.trusted,
            segments=layout.segments,
            n_segments=layout.n_segments,
            fill=fill and any(map(has_slot, layout.parameters)),  # all parameters may be frozen
        )
