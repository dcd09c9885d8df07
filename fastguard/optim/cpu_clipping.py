"""Update clipping and spike-aware clipping on a CPU, with the operations of the reference.

I/O of update clipping per element: one more read of the gradient and of the second moment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastguard.optim import reference
from fastguard.optim.contract import RESET, SPIKE, SUM_SCALE, Update
from fastguard.optim.pieces import pieces
from fastguard.optim.scratch import Scratch, joined, scale


def prepare(
    update: Update,
    members: list[int],
    names: Sequence[str],
    coefficients: Tensor,
    multiplier: float,
    clean: bool,
) -> None:
    """Resets the moments of some tensors if it is time, and lowers their learning rate.

    Args:
        update: The update, which is not skipped.
        members: Positions of tensors with the same coefficients; a single one with update clipping.
        names: Names of the states.
        coefficients: float64 `(13,)`, written.
        multiplier: Factor of the gradients.
        clean: Whether non-finite gradient elements count as 0.
    """
    if update.spike_aware and coefficients[RESET] != 0.0:
        for name in names:
            torch._foreach_zero_([update.states[name][i] for i in members])
    if update.update_clipping:
        ratio = _update_ratio(update, members, names, coefficients, multiplier, clean)
        reference.lower_lr(coefficients, ratio)


def _update_ratio(
    update: Update,
    members: list[int],
    names: Sequence[str],
    coefficients: Tensor,
    multiplier: float,
    clean: bool,
) -> Tensor:
    """Returns the number of `reference.update_ratio` for one tensor."""
    c = coefficients.to(update.dtype).tolist()
    scratch = Scratch(update.dtype)
    total = 0
    for piece in pieces(update, members, names):
        g = scratch.line("g", piece.n)
        scale(joined(piece.grads), multiplier, clean, g)
        states = [scratch.widened(f"state {number}", of) for number, of in enumerate(piece.states)]
        limit_spikes(update, g, states[1], c, scratch)
        moments = reference.second_moments(update, g, states, c)
        denominators = reference.root(moments).mul_(c[6]).clamp_(min=c[4])
        total += int(reference.sum_of_squares(g / denominators, c[SUM_SCALE]).item())
    elements = sum(update.parameters[i].numel() for i in members)
    return torch.tensor(float(total), dtype=torch.float64) / (coefficients[SUM_SCALE] * elements)


def limit_spikes(update: Update, g: Tensor, v: Tensor, c: list[float], scratch: Scratch) -> None:
    """Applies `reference.without_spikes` to a gradient in place."""
    if not update.spike_aware or c[SPIKE] == np.inf:
        return
    bound = torch.mul(v, c[SPIKE], out=scratch.line("t", g.numel()))
    np.sqrt(bound.numpy(), out=bound.numpy())
    spikes = (g.abs() > bound) & (v > 0.0)  # False for NaN
    if spikes.any():
        g.copy_(torch.where(spikes, torch.copysign(bound, g), g))
