"""The update on a CPU, which reads the verdict first, so that an unclipped step costs no more.

* Direct: torch's fused kernel on the tensors themselves, if it computes the same result. A
  multiplier is applied to a copy of the gradient, piece by piece: with `grad_scale`, torch would
  write the gradient, which is slower and changes `.grad`.
* Through float32: all other cases. A piece is converted to float32 in memory that stays in the
  cache, updated there by torch's fused kernel, and converted back. With `reproducible`, and for
  Lion, the operations of the reference replace the fused kernel, in the same order.

I/O: as in `fastguard.optim.contract`; the float32 copies stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import lasting
from fastguard.gradients.vectors import in_memory_order
from fastguard.optim import bits, cpu_clipping, reference
from fastguard.optim.contract import HYPER, KEY, RESET, STATES, Update
from fastguard.optim.cpu_fused import HALF, Fused, is_equivalent
from fastguard.optim.cpu_statistics import PieceStatistics
from fastguard.optim.cpu_units import load_gradient, unit_factors
from fastguard.optim.pieces import Piece, fits, pieces
from fastguard.optim.scratch import Scratch, joined, scatter, split


def update(update: Update) -> Tensor | None:
    """Takes the step of one bucket, or changes nothing if the step is skipped.

    Returns:
        See `reference.update`; None for a skipped step too.
    """
    if not update.found_inf.item() == 0.0:  # a NaN skips the step
        return None
    if update.steps:
        torch._foreach_add_(list(update.steps), _ONE)
    names = [name for name in STATES[update.algorithm] if name in update.states]
    rows, multipliers = update.hyper.tolist(), update.multiplier.tolist()
    clean = update.clean.item() != 0.0
    of_units, summary = unit_factors(update, multipliers)
    for key, members in _by_coefficients(update, multipliers, of_units).items():
        group = key.group
        factors = _Factors(key.multiplier, clean, of_units if key.clips_units else ())
        hyper = dict(zip(HYPER, rows[group], strict=True))
        if is_equivalent(update, names) and not _rounds_twice(update, factors):
            fused = Fused(update, hyper, update.steps and update.steps[members[0]])
            _directly(update, members, names, fused, factors)
        else:
            _through_float32(update, members, names, hyper, group, factors)
    return summary


with lasting():
    _ONE = torch.tensor(1.0, device="cpu")


class _Key(NamedTuple):
    """The common properties of tensors that are updated together."""

    group: int
    multiplier: float
    step: float
    clips_units: bool  # whether some units of the tensors are clipped
    alone: int


class _Factors(NamedTuple):
    """How the gradients of some tensors are scaled: see `cpu_units.load_gradient`."""

    multiplier: float
    clean: bool
    of_units: Sequence[Tensor | None]  # see `pieces`

    @property
    def keep_gradients(self) -> bool:
        """Whether gradients are used as they are."""
        return self.multiplier == 1.0 and not self.clean and not self.of_units


def _by_coefficients(
    update: Update, multipliers: Sequence[float], of_units: Sequence[Tensor | None]
) -> dict[_Key, list[int]]:
    """Groups positions of tensors by param group, multiplier, step count and clipping of units.

    The tensors of a group have equal coefficients, except for the learning rate, which update
    clipping may lower for each tensor. With update clipping, a tensor that does not fit in a piece
    forms a group of its own. For torch's fused Adam, which takes one step count per tensor, counts
    may differ within a group.
    """
    counted = update.steps and not _fused_serves_several_steps(update)
    steps = torch.stack(list(update.steps)).tolist() if counted else [0.0] * len(update.parameters)
    found: dict[_Key, list[int]] = {}
    keys = zip(update.group_ids, update.segment_ids, steps, strict=True)
    for i, (group, segment, step) in enumerate(keys):
        multiplier = multipliers[segment] if len(multipliers) > 1 else multipliers[0]
        is_long = update.update_clipping and not fits(update.parameters[i])
        alone = i if is_long else -1
        key = _Key(group, multiplier, step, of_units[i] is not None, alone)
        found.setdefault(key, []).append(i)
    return found


def _fused_serves_several_steps(update: Update) -> bool:
    names = [name for name in STATES[update.algorithm] if name in update.states]
    return update.algorithm in ("adam", "adamw") and is_equivalent(update, names)


def _rounds_twice(update: Update, factors: _Factors) -> bool:
    """Whether a 16-bit copy of the scaled gradient would add a rounding."""
    scales = factors.multiplier != 1.0 or len(factors.of_units) > 0
    return scales and update.parameters[0].dtype in HALF


def _directly(
    update: Update,
    members: list[int],
    names: Sequence[str],
    fused: Fused,
    factors: _Factors,
) -> None:
    p = update.parameters[0]
    as_they_are = factors.keep_gradients and update.grads[0].dtype is p.dtype
    if as_they_are and update.statistics is None and _all_contiguous(update, names):
        every = len(members) == len(update.parameters)

        def selected(of: Sequence[Tensor]) -> list[Tensor]:
            return list(of) if every else [of[i] for i in members]

        states = [selected(update.states[name]) for name in names]
        steps = selected(update.steps) if update.steps else []
        fused(selected(update.parameters), selected(update.grads), states, steps)
        return
    scratch = Scratch(p.dtype)
    statistics = PieceStatistics.of(update)
    for piece in pieces(update, members, names, factors.of_units):
        grads = piece.grads
        if not as_they_are:
            line = scratch.line("g", piece.n)
            load_gradient(piece, factors.multiplier, factors.clean, line)
            grads = split(line, grads)
        if statistics is not None:
            statistics.before(piece, piece.parameters)
        fused(piece.parameters, grads, piece.states, piece.steps)
        if statistics is not None:
            statistics.after(piece, piece.parameters)
        piece.write_back()


def _all_contiguous(update: Update, names: Sequence[str]) -> bool:
    lists = [update.parameters, update.grads, *(update.states[name] for name in names)]
    return all(False not in set(map(Tensor.is_contiguous, of)) for of in lists)


# Updates through float32.


def _through_float32(
    update: Update,
    members: list[int],
    names: Sequence[str],
    hyper: dict[str, float],
    group: int,
    factors: _Factors,
) -> None:
    scratch, statistics = Scratch(update.dtype), PieceStatistics.of(update)
    step = update.steps[members[0]] if update.steps else None
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    count = one if step is None else step.double().reshape(1)
    row = update.hyper[group : group + 1]
    # The coefficients of the first tensor apply to all; update clipping adapts them to each piece.
    exact = _coefficients(update, members[:1], row, count)
    if update.spike_aware and exact[0, RESET] != 0.0:
        for name in names:
            torch._foreach_zero_([update.states[name][i] for i in members])
    is_long = update.update_clipping and not fits(update.parameters[members[0]])
    if is_long:
        cpu_clipping.clip_long(update, members[0], names, exact, factors.multiplier, factors.clean)
    key, c = exact[0, KEY].long(), exact[0].to(update.dtype).tolist()
    by_torch = update.algorithm != "lion" and not update.reproducible
    fused = _fused(update, hyper, step, exact) if by_torch else None
    for piece in pieces(update, members, names, factors.of_units):
        w = _load_weight(update, piece, scratch)
        if statistics is not None:
            statistics.before(piece, [w])
        g = scratch.line("g", piece.n)
        load_gradient(piece, factors.multiplier, factors.clean, g)
        if fused is not None and len(piece.members) > 1 and _are_in_place(update, piece):
            fused(split(w, piece.parameters), split(g, piece.parameters), piece.states, piece.steps)
            _store_weight(update, piece, w, None, statistics)
            piece.write_back()
            continue
        states = [scratch.widened(f"state {number}", of) for number, of in enumerate(piece.states)]
        if update.spike_aware:
            cpu_clipping.limit_spikes(update, g, states[1], c, scratch)
        if update.update_clipping and not is_long:
            exact = _coefficients(update, piece.members, row, count)
            c = cpu_clipping.clip_short(update, piece, g, states, exact, scratch)
            fused = _fused(update, hyper, step, exact) if by_torch and len(exact) == 1 else None
        if fused is not None:
            fused([w], [g], [[s] for s in states], [] if step is None else [step])
        else:
            if hyper["sign"] < 0.0:
                g.neg_()
            _formula(update, w, g, states, c, scratch)
        noise = _noise(update, piece, key)
        for number, (of, values) in enumerate(zip(piece.states, states, strict=True), 1):
            _store(of, values, noise, number)
        _store_weight(update, piece, w, noise, statistics)
        piece.write_back()


def _coefficients(update: Update, members: list[int], row: Tensor, count: Tensor) -> Tensor:
    """Returns the coefficients of tensors of one param group and step count, float64 `(k, 13)`."""
    n = len(members)
    elements = torch.tensor(
        [float(update.parameters[i].numel()) for i in members], dtype=torch.float64, device="cpu"
    )
    return reference.coefficients(update, row.expand(n, -1), count.expand(n), elements)


def _fused(update: Update, hyper: dict[str, float], step: Any, exact: Tensor) -> Fused:
    """Returns torch's kernel with the learning rate of these coefficients."""
    if update.spike_aware or update.update_clipping:
        lr = exact[0, 5].item() * (1.0 - hyper["beta1"] ** step.item())
        decay = 1.0 - exact[0, 7].item()
        hyper = hyper | {"lr": lr, "weight_decay": decay / lr if lr else 0.0}
    return Fused(update, hyper, step)


def _are_in_place(update: Update, piece: Piece) -> bool:
    """Whether torch's kernel can update the states of several tensors without joining them."""
    if update.spike_aware or update.update_clipping or update.rounding == "stochastic":
        return False
    return all(of[0].dtype is update.dtype for of in piece.states)


def _noise(update: Update, piece: Piece, key: Tensor) -> Tensor | None:
    if update.rounding != "stochastic":
        return None
    streams = [
        bits.stream(key, first, in_memory_order(p))
        for first, p in zip(piece.counters, piece.parameters, strict=True)
    ]
    return streams[0] if len(streams) == 1 else torch.cat(streams)


def _load_weight(update: Update, piece: Piece, scratch: Scratch) -> Tensor:
    if update.master == "float32":
        return scratch.widened("w", piece.masters)
    if update.master is None:
        return scratch.widened("w", piece.parameters)
    w = scratch.widened("w", piece.parameters)
    # The bits of the weight are `high << 16`, and the remainder is signed: see `bits`. Adding int16
    # to int32 would allocate a copy, which takes as long as all other conversions together.
    low = scratch.line("t", piece.n).view(torch.int32).copy_(joined(piece.masters))
    w.view(torch.int32).add_(low)
    return w


def _store_weight(
    update: Update,
    piece: Piece,
    w: Tensor,
    noise: Tensor | None,
    statistics: PieceStatistics | None,
) -> None:
    """Stores the new weights of a piece, and adds their statistics."""
    if update.master is None:
        _store(piece.parameters, w, noise, 0)
        if statistics is not None:
            is_stored = piece.parameters[0].dtype is w.dtype
            statistics.after(piece, [w] if is_stored else piece.parameters)
        return
    if statistics is not None:  # added before `w` is overwritten
        statistics.after(piece, [w])
    if update.master == "remainder":
        if not math.isfinite(w.sum().item()):
            high, low = bits.split(w)
            scatter(piece.masters, low)
            scatter(piece.parameters, high)
            return
        as_bits = w.view(torch.int32)
        scatter(piece.masters, as_bits)  # the conversion keeps the lower 16 bits
        # If the last bit is set, there is no tie, so rounding to nearest rounds half up.
        as_bits.bitwise_or_(1)
        scatter(piece.parameters, w)
        return
    _store(piece.masters, w, None, 0)
    _store(piece.parameters, w, None, 0)


def _store(of: list[Tensor], values: Tensor, noise: Tensor | None, number: int) -> None:
    dtype = of[0].dtype
    if len(of) == 1 and dtype is values.dtype and of[0].data_ptr() == values.data_ptr():
        return  # the tensor was updated in place
    scatter(of, values if noise is None else reference.stored(values, dtype, noise, number))


def _formula(
    update: Update, p: Tensor, g: Tensor, states: list[Tensor], c: list[float], scratch: Scratch
) -> None:
    """Applies `reference.formula` in place, with the same operations and therefore equal bits."""
    if update.algorithm == "sgd":
        _sgd(update, p, g, states, c)
        return
    if update.algorithm == "lion":
        (m,) = states
        toward = torch.mul(m, c[0], out=scratch.line("t", g.numel()))
        toward.add_(torch.mul(g, c[1], out=scratch.line("u", g.numel())))
        if math.isnan(
            toward.sum().item()
        ):  # also true after Inf - Inf, for which the slower computation is correct too
            toward.copy_(toward.sign().masked_fill_(toward.isnan(), math.nan))
        else:
            toward.sign_()
        p.mul_(c[5]).sub_(toward.mul_(c[4]))
        m.mul_(c[2]).add_(g.mul_(c[3]))
        return
    m, v = states[:2]
    if update.algorithm == "adam" and c[7] != 0.0:
        g.add_(p * c[7])
    t = torch.sub(g, m, out=scratch.line("t", g.numel()))
    m.add_(t.mul_(c[1]))
    v.mul_(c[2]).add_(g.mul_(g).mul_(c[3]))
    largest = torch.maximum(states[2], v, out=states[2]) if update.amsgrad else v
    np.sqrt(largest.numpy(), out=g.numpy())  # correctly rounded, unlike torch's square root
    g.mul_(c[6]).add_(c[4])
    step = torch.mul(m, c[5], out=t).div_(g)
    if update.algorithm == "adamw":
        p.mul_(c[7])
    p.sub_(step)


def _sgd(update: Update, p: Tensor, g: Tensor, states: Iterable[Tensor], c: list[float]) -> None:
    if c[2] != 0.0:
        g.add_(p * c[2])
    for m in states:
        m.mul_(c[0]).add_(g * c[1])
        if update.nesterov:
            g.add_(m * c[0])
        else:
            g = m
    p.sub_(g * c[3])
