"""The update on a CPU. The verdict is read first, so that a step without clipping costs no more.

* Direct: torch's fused kernel on the tensors themselves, if it computes the same. A multiplier is
  applied to a copy of the gradient, piece by piece: with `grad_scale`, torch would write the
  gradient, which is slower and changes `.grad`.
* Through float32: all other cases. A piece is converted to float32 in memory that stays in the
  cache, updated there by torch's fused kernel, and converted back. With `reproducible`, and for
  Lion, the operations of the reference replace the fused kernel, in the same order.

I/O: as in `fastguard.optim.contract`; the float32 copies stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import lasting
from fastguard.optim import bits, reference
from fastguard.optim.contract import HYPER, KEY, STATES, Update
from fastguard.optim.pieces import Piece, pieces

HALF = (torch.bfloat16, torch.float16)


def update(update: Update) -> None:
    """Takes the step of one bucket, or changes nothing if the step is skipped."""
    if not update.found_inf.item() == 0.0:  # skips if NaN
        return
    if update.steps:
        torch._foreach_add_(list(update.steps), _ONE)
    names = [name for name in STATES[update.algorithm] if name in update.states]
    rows, multipliers = update.hyper.tolist(), update.multiplier.tolist()
    clean = update.clean.item() != 0.0
    for (group, multiplier, _), members in _by_coefficients(update, multipliers).items():
        hyper = dict(zip(HYPER, rows[group], strict=True))
        if _fused_is_equivalent(update, names) and not _rounds_twice(update, multiplier):
            fused = _Fused(update, hyper, update.steps and update.steps[members[0]])
            _directly(update, members, names, fused, multiplier, clean)
        else:
            _through_float32(update, members, names, hyper, group, multiplier, clean)


with lasting():
    _ONE = torch.tensor(1.0, device="cpu")


def _by_coefficients(
    update: Update, multipliers: Sequence[float]
) -> dict[tuple[int, float, float], list[int]]:
    """Groups positions of tensors by param group, multiplier and step count.

    The tensors of a group have equal coefficients. torch's fused Adam takes one step count per
    tensor, so the count is ignored there.
    """
    counted = update.steps and not _fused_serves_several_steps(update)
    steps = torch.stack(list(update.steps)).tolist() if counted else [0.0] * len(update.parameters)
    found: dict[tuple[int, float, float], list[int]] = {}
    keys = zip(update.group_ids, update.segment_ids, steps, strict=True)
    for i, (group, segment, step) in enumerate(keys):
        multiplier = multipliers[segment] if len(multipliers) > 1 else multipliers[0]
        found.setdefault((group, multiplier, step), []).append(i)
    return found


def _fused_serves_several_steps(update: Update) -> bool:
    names = [name for name in STATES[update.algorithm] if name in update.states]
    return update.algorithm in ("adam", "adamw") and _fused_is_equivalent(update, names)


def _fused_is_equivalent(update: Update, names: Sequence[str]) -> bool:
    """Whether torch's fused kernel computes the same directly on the tensors."""
    dtype = update.parameters[0].dtype
    if update.algorithm == "sgd" and dtype in HALF:
        return False  # torch 2.13 combines the wrong halves of vectors: weights off by whole steps
    if dtype is torch.float16:
        return False  # torch rounds the second moment before using it, and it underflows
    return (
        update.algorithm != "lion"
        and not update.reproducible
        and update.master is None
        and update.rounding == "nearest"
        and all(update.states[name][0].dtype is dtype for name in names)
        and (update.grads[0].dtype is dtype or dtype not in HALF)
    )


def _rounds_twice(update: Update, multiplier: float) -> bool:
    """Whether a 16-bit copy of the scaled gradient would add a rounding."""
    return multiplier != 1.0 and update.parameters[0].dtype in HALF


class _Fused:
    """torch's fused kernel of an algorithm, with the hyper-parameters of one param group."""

    def __init__(self, update: Update, hyper: dict[str, float], step: Any) -> None:
        self.algorithm, self.amsgrad = update.algorithm, update.amsgrad
        common: dict[str, Any] = {
            "lr": hyper["lr"],
            "weight_decay": hyper["weight_decay"],
            "maximize": hyper["sign"] < 0.0,
        }
        if update.algorithm == "sgd":
            first = isinstance(step, Tensor) and step.item() == 1.0
            self.options = common | {
                "momentum": hyper["momentum"],
                "dampening": hyper["dampening"],
                "nesterov": update.nesterov,
                "is_first_step": first,
            }
            return
        self.call = torch._fused_adamw_ if update.algorithm == "adamw" else torch._fused_adam_
        self.options = common | {
            "beta1": hyper["beta1"],
            "beta2": hyper["beta2"],
            "eps": hyper["eps"],
            "amsgrad": update.amsgrad,
        }

    def __call__(
        self,
        parameters: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        steps: list[Tensor],
    ) -> None:
        if self.algorithm == "sgd":
            buffers = states[0] if states else []
            torch._fused_sgd_(parameters, grads, buffers, **self.options)
            return
        largest = states[2] if self.amsgrad else []
        self.call(parameters, grads, states[0], states[1], largest, steps, **self.options)


def _directly(
    update: Update,
    members: list[int],
    names: Sequence[str],
    fused: _Fused,
    multiplier: float,
    clean: bool,
) -> None:
    p = update.parameters[0]
    as_they_are = multiplier == 1.0 and not clean and update.grads[0].dtype is p.dtype
    if as_they_are and _all_contiguous(update, names):
        every = len(members) == len(update.parameters)

        def selected(of: Sequence[Tensor]) -> list[Tensor]:
            return list(of) if every else [of[i] for i in members]

        states = [selected(update.states[name]) for name in names]
        steps = selected(update.steps) if update.steps else []
        fused(selected(update.parameters), selected(update.grads), states, steps)
        return
    scratch = _Scratch(p.dtype)
    for piece in pieces(update, members, names):
        grads = piece.grads
        if not as_they_are:
            line = scratch.line("g", piece.n)
            _scale(_joined(grads), multiplier, clean, line)
            grads = _unflatten(line, grads) if len(grads) > 1 else [line]
        fused(piece.parameters, grads, piece.states, piece.steps)
        piece.write_back()


def _all_contiguous(update: Update, names: Sequence[str]) -> bool:
    lists = [update.parameters, update.grads, *(update.states[name] for name in names)]
    return all(False not in set(map(Tensor.is_contiguous, of)) for of in lists)


def _scale(g: Tensor, multiplier: float, clean: bool, out: Tensor) -> None:
    """Cleans and scales like `reference.scaled`, but leaves the sign to the formula."""
    if clean:
        g = torch.nan_to_num(g.to(out.dtype), nan=0.0, posinf=0.0, neginf=0.0)
    if abs(multiplier) < reference.SMALLEST_FACTOR:
        g = g.to(out.dtype) * reference.SMALLEST_FACTOR
        multiplier /= reference.SMALLEST_FACTOR
    if multiplier == 1.0:
        out.copy_(g)
    elif g.dtype is out.dtype:
        torch.mul(g, multiplier, out=out)
    else:  # an operation on mixed dtypes takes three times as long
        out.copy_(g).mul_(multiplier)


# Through float32.


class _Scratch:
    """Reusable memory for one piece at a time, in the dtype of the arithmetic."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._lines: dict[str, Tensor] = {}

    def line(self, name: str, n: int) -> Tensor:
        held = self._lines.get(name)
        if held is None or held.numel() < n:
            held = self._lines[name] = torch.empty(n, dtype=self.dtype)
        return held[:n]

    def widened(self, name: str, tensors: list[Tensor]) -> Tensor:
        """Returns the elements of tensors as one vector of the dtype; a view if possible."""
        flat = _joined(tensors)
        return flat if flat.dtype is self.dtype else self.line(name, flat.numel()).copy_(flat)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Returns the elements of tensors as one vector: a view of a single tensor, else a copy."""
    return bits.in_memory_order(tensors[0]) if len(tensors) == 1 else _flatten(tensors)


def _scatter(of: list[Tensor], values: Tensor) -> None:
    """Copies a vector back to the tensors: the inverse of `_joined`."""
    if len(of) == 1:
        bits.in_memory_order(of[0]).copy_(values)
    else:
        torch._foreach_copy_(of, _unflatten(values, of))


# Pieces of several tensors contain only contiguous ones: see `pieces`.
_flatten = torch._C._nn.flatten_dense_tensors  # type: ignore[attr-defined]
_unflatten = torch._C._nn.unflatten_dense_tensors  # type: ignore[attr-defined]


def _through_float32(
    update: Update,
    members: list[int],
    names: Sequence[str],
    hyper: dict[str, float],
    group: int,
    multiplier: float,
    clean: bool,
) -> None:
    scratch = _Scratch(update.dtype)
    step = update.steps[members[0]] if update.steps else None
    count = torch.ones(1, dtype=torch.float64) if step is None else step.double().reshape(1)
    row = update.hyper[group : group + 1]
    c = reference.coefficients(update, row, count)[0]
    key, c = c[KEY].long(), [x.item() for x in c.to(update.dtype)]
    by_torch = update.algorithm != "lion" and not update.reproducible
    fused = _Fused(update, hyper, step) if by_torch else None
    for piece in pieces(update, members, names):
        w = _load_weight(update, piece, scratch)
        g = scratch.line("g", piece.n)
        _scale(_joined(piece.grads), multiplier, clean, g)
        states = [scratch.widened(f"state {number}", of) for number, of in enumerate(piece.states)]
        if fused is not None:
            fused([w], [g], [[s] for s in states], [] if step is None else [step])
        else:
            if hyper["sign"] < 0.0:
                g.neg_()
            _formula(update, w, g, states, c, scratch)
        noise = _noise(update, piece, key)
        for number, (of, values) in enumerate(zip(piece.states, states, strict=True), 1):
            _store(of, values, noise, number)
        _store_weight(update, piece, w, noise)
        piece.write_back()


def _noise(update: Update, piece: Piece, key: Tensor) -> Tensor | None:
    if update.rounding != "stochastic":
        return None
    streams = [
        bits.stream(key, first, bits.in_memory_order(p))
        for first, p in zip(piece.counters, piece.parameters, strict=True)
    ]
    return streams[0] if len(streams) == 1 else torch.cat(streams)


def _load_weight(update: Update, piece: Piece, scratch: _Scratch) -> Tensor:
    if update.master == "float32":
        return scratch.widened("w", piece.masters)
    if update.master is None:
        return scratch.widened("w", piece.parameters)
    w = scratch.widened("w", piece.parameters)
    # The bits of the weight are `high << 16`; the remainder is signed: see `bits`.
    w.view(torch.int32).add_(_joined(piece.masters))
    return w


def _store_weight(update: Update, piece: Piece, w: Tensor, noise: Tensor | None) -> None:
    if update.master == "remainder":
        if not math.isfinite(w.sum().item()):  # NaN would carry into the sign bit
            w.copy_(bits.bits_of(w).view(torch.float32))
        as_bits = w.view(torch.int32)
        _scatter(piece.masters, as_bits.to(torch.int16))
        high = as_bits.add_(0x8000).bitwise_right_shift_(16).to(torch.int16)
        _scatter(piece.parameters, high.view(torch.bfloat16))
        return
    if update.master == "float32":
        _store(piece.masters, w, None, 0)
        noise = None
    _store(piece.parameters, w, noise, 0)


def _store(of: list[Tensor], values: Tensor, noise: Tensor | None, number: int) -> None:
    dtype = of[0].dtype
    if len(of) == 1 and dtype is values.dtype and of[0].data_ptr() == values.data_ptr():
        return  # it was updated in place
    _scatter(of, reference.stored(values, dtype, noise, number))


def _formula(
    update: Update, p: Tensor, g: Tensor, states: list[Tensor], c: list[float], scratch: _Scratch
) -> None:
    """Applies `reference.formula` in place, with the same operations and so the same bits."""
    if update.algorithm == "sgd":
        _sgd(update, p, g, states, c)
        return
    if update.algorithm == "lion":
        (m,) = states
        toward = torch.mul(m, c[0], out=scratch.line("t", g.numel()))
        toward.add_(torch.mul(g, c[1], out=scratch.line("u", g.numel())))
        if math.isnan(
            toward.sum().item()
        ):  # also after Inf - Inf, for which this slower way is right too
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
    np.sqrt(largest.numpy(), out=g.numpy())  # correctly rounded, unlike torch's
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
