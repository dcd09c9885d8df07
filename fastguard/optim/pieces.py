"""Splits the tensors of an update on a CPU into pieces that fit in the cache.

A piece is a part of one long tensor, or several short tensors with the same coefficients, with
elements in memory order. If the strides of a parameter, its gradient and its state differ, the
piece holds copies with the strides of the parameter, which are written back afterward, because
torch's fused CPU kernels ignore strides and would combine the wrong elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastguard.gradients.vectors import in_memory_order
from fastguard.optim.contract import Update

PIECE = 2**18
"""Maximum number of elements of a piece: 1 MB of float32 per array.

Every operation on a piece has an overhead of about 2 µs. With pieces of 2**15 elements, an update
through float32 takes twice as long; with 2**20 elements, it takes a tenth longer [EPYC, 1 MB of L2,
32 MB of L3].
"""
JOINED = 2**16
"""Maximum number of elements of joined short tensors, which are copied to the piece and back."""


@dataclass(slots=True)
class Piece:
    """Tensors that are updated together.

    Attributes:
        members: Positions of the tensors in the update.
        parameters, grads: One-dimensional views; several short tensors keep their shapes.
        states: One list per state of the algorithm, with one tensor per parameter.
        masters: One tensor per parameter; empty without a master.
        steps: The step counters; empty if steps are not counted.
        counters: The counters of the first elements in this piece, see `Update.counters`.
        factors: The factors of the units in this piece, see `cpu_units`; one tensor `(k, n, 1)` for
            each tensor, or empty.
        copies: `(original, copy)` pairs to write back.
        n: Total number of elements.
    """

    members: list[int] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    counters: list[int] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    n: int = 0

    def write_back(self) -> None:
        """Copies results back to the tensors that were replaced with copies."""
        for original, copy in self.copies:
            original.copy_(copy)


def fits(tensor: Tensor) -> bool:
    """Whether a tensor fits in one piece."""
    return tensor.numel() <= PIECE


def pieces(
    update: Update,
    members: Sequence[int],
    states: Sequence[str],
    factors: Sequence[Tensor | None] = (),
) -> Iterator[Piece]:
    """Yields pieces of some tensors of an update.

    Args:
        update: The update.
        members: Positions of tensors with the same coefficients.
        states: Names of the states, in order.
        factors: The factors of the units of all T tensors, see `cpu_units`. Either all members have
            factors, or none has. Tensors with factors are split between units, or within one unit.
            Default: none.
    """
    lists = [update.parameters, update.grads, *(update.states[s] for s in states)]
    if update.masters:
        lists.append(update.masters)
    joined = _empty(states)
    for i in members:
        tensors = [of[i] for of in lists]
        n = tensors[0].numel()
        step = [update.steps[i]] if update.steps else []
        first = update.counters[i] if update.counters else 0
        own = factors[i] if factors else None
        copies: list[tuple[Tensor, Tensor]] = []
        if not all(map(Tensor.is_contiguous, tensors)):
            tensors, copies = _alike(tensors)
        if fits(tensors[0]):
            if joined.n and joined.n + n > JOINED:
                yield joined
                joined = _empty(states)
            _add(joined, i, tensors, step, first, own, update)
            joined.copies += copies
            continue
        at, row = 0, n if own is None else n // own.shape[1]
        for views in zip(*(_parts(in_memory_order(t), row) for t in tensors), strict=True):
            piece = _empty(states)
            end = at + views[0].numel()
            here = None if own is None else own[:, at // row : -(-end // row)]
            _add(piece, i, list(views), step, first + at, here, update)
            at = end
            yield piece
        for original, copy in copies:
            original.copy_(copy)
    if joined.n:
        yield joined


def _parts(flat: Tensor, row: int) -> list[Tensor]:
    """Splits a vector into pieces of whole rows, or rows that are too long into pieces."""
    if row <= PIECE:
        return list(flat.split(PIECE // row * row))
    return [part for one in flat.split(row) for part in one.split(PIECE)]


def _empty(states: Sequence[str]) -> Piece:
    return Piece(states=[[] for _ in states])


def _add(
    piece: Piece,
    i: int,
    tensors: list[Tensor],
    step: list[Tensor],
    first: int,
    factors: Tensor | None,
    u: Update,
) -> None:
    n_states = len(piece.states)
    piece.members.append(i)
    piece.parameters.append(tensors[0])
    piece.grads.append(tensors[1])
    for of, t in zip(piece.states, tensors[2 : 2 + n_states], strict=True):
        of.append(t)
    piece.masters += tensors[2 + n_states :]
    piece.steps += step
    if factors is not None:
        piece.factors.append(factors)
    if u.counters:
        piece.counters.append(first)
    piece.n += tensors[0].numel()


def _alike(tensors: list[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Returns tensors as vectors in the memory order of the first, and `(original, copy)` pairs.

    A tensor with other strides is copied. The second tensor, the gradient, is never written back.
    """
    p = tensors[0]
    like = torch.empty_like(p)  # a dense tensor; it has the strides of `p` if `p` is dense
    out, copies = [], []
    for number, t in enumerate(tensors):
        if t.stride() != like.stride():
            copy = torch.empty_like(like, dtype=t.dtype).copy_(t)
            if number != 1:
                copies.append((t, copy))
            t = copy
        out.append(in_memory_order(t))
    return out, copies
