"""Update clipping and spike-aware clipping on a CPU, with the same operations as the reference.

Tensors that fit in a piece are clipped while they are in the cache. The gradient and the second
moment of a longer tensor are read once more, before the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard.optim import reference
from fastguard.optim.contract import SPIKE, SUM_SCALE, Update
from fastguard.optim.pieces import Piece, pieces
from fastguard.optim.scratch import Scratch, joined, scale


def limit_spikes(update: Update, g: Tensor, v: Tensor, c: Sequence[Any], scratch: Scratch) -> None:
    """Applies `reference.without_spikes` to a gradient in place."""
    if not update.spike_aware or c[SPIKE] == np.inf:
        return
    bound = torch.mul(v, c[SPIKE], out=scratch.line("t", g.numel()))
    np.sqrt(bound.numpy(), out=bound.numpy())
    # the comparison is False for NaN
    spikes = (torch.abs(g, out=scratch.line("u", g.numel())) > bound) & (v > 0.0)
    if spikes.any():
        g.copy_(torch.where(spikes, torch.copysign(bound, g), g))


def clip_long(
    update: Update,
    i: int,
    names: Sequence[str],
    coefficients: Tensor,
    multiplier: float,
    clean: bool,
) -> None:
    """Lowers the learning rate of a tensor that does not fit in a piece.

    Args:
        update: The update, which is not skipped.
        i: Position of the tensor.
        names: Names of the states.
        coefficients: float64 `(1, 13)`, changed in place.
        multiplier: Factor of the gradients.
        clean: Whether non-finite gradient elements count as 0.
    """
    c = coefficients[0].to(update.dtype).tolist()
    scratch, total = Scratch(update.dtype), 0.0
    for piece in pieces(update, [i], names):
        g = scratch.line("g", piece.n)
        scale(joined(piece.grads), multiplier, clean, g)
        states = [scratch.widened(f"state {number}", of) for number, of in enumerate(piece.states)]
        limit_spikes(update, g, states[1], c, scratch)
        total += _terms(update, g, states, c, scratch).sum(dtype=torch.float64).item()
    sizes = torch.tensor([float(update.parameters[i].numel())], dtype=torch.float64, device="cpu")
    _lower(coefficients, torch.tensor([total], dtype=torch.float64, device="cpu"), sizes)


def clip_short(
    update: Update,
    piece: Piece,
    g: Tensor,
    states: list[Tensor],
    coefficients: Tensor,
    scratch: Scratch,
) -> list[Any]:
    """Lowers the learning rates of the tensors of a piece, which holds each tensor completely.

    Args:
        update: The update.
        piece: The piece, which contains k tensors.
        g, states: The gradient of the piece, with spikes already limited, and the states, both in
            the dtype of the arithmetic.
        coefficients: float64 `(k, 13)`, changed in place.
        scratch: The memory to use.

    Returns:
        The coefficients in the dtype of the arithmetic: one number each, or one number per element
        for coefficients that differ between tensors.
    """
    sizes = torch.tensor([p.numel() for p in piece.parameters], device="cpu")
    c = _for_elements(coefficients, sizes, update.dtype, (SUM_SCALE,))
    terms = _terms(update, g, states, c, scratch)
    if len(sizes) == 1:
        sums = terms.sum(dtype=torch.float64).reshape(1)
    else:  # uses differences of running sums, which also work for empty tensors
        running = torch.nn.functional.pad(terms.long().cumsum(0), (1, 0))
        ends = sizes.cumsum(0)
        sums = (running[ends] - running[ends - sizes]).double()
    _lower(coefficients, sums, sizes.double())
    return _for_elements(coefficients, sizes, update.dtype, (5, 7))


def _for_elements(
    coefficients: Tensor, sizes: Tensor, dtype: torch.dtype, columns: tuple[int, ...]
) -> list[Any]:
    """Returns each column as a number, or as one number per element if the values differ."""
    rounded = coefficients.to(dtype)
    c: list[Any] = rounded[0].tolist()
    if len(sizes) > 1:
        for column in columns:
            c[column] = torch.repeat_interleave(rounded[:, column], sizes)
    return c


def _terms(
    update: Update, g: Tensor, states: list[Tensor], c: Sequence[Any], scratch: Scratch
) -> Tensor:
    """Returns the terms of `reference.update_ratio`, which are integers, in scratch memory."""
    t, u = (scratch.line(name, g.numel()) for name in "tu")
    v = torch.mul(states[1], c[2], out=t).add_(torch.mul(g, g, out=u).mul_(c[3]))
    if update.amsgrad:
        torch.maximum(states[2], v, out=v)
    np.sqrt(v.numpy(), out=v.numpy())
    x = torch.div(g, v.mul_(c[6]).clamp_(min=c[4]), out=u)
    terms = x.mul_(x).mul_(c[SUM_SCALE]).floor_()
    if not np.isfinite(terms.sum().item()):
        terms.masked_fill_(~terms.isfinite(), 0.0)
    return terms


def _lower(coefficients: Tensor, sums: Tensor, sizes: Tensor) -> None:
    reference.lower_lr(coefficients, sums / (coefficients[:, SUM_SCALE] * sizes))
