"""The update in plain PyTorch, operation by operation: the reference for all other backends.

    g <- 0 where g is non-finite and the verdict cleans
    g <- g * (multiplier[segment] * coef[unit]) * sign        coef: see `stages.agc`; else 1

    AdamW  m <- m + (g - m) * (1 - b1)                       Adam: first  g <- g + p * wd
           v <- v * b2 + (g * g) * (1 - b2)
           w <- max(w, v), with amsgrad; else w = v
           p <- p * (1 - lr * wd) - (m * (lr / bc1)) / (sqrt(w) * (1 / sqrt(bc2)) + eps)
           SPAM: first, at every `momentum_reset`-th step,  m, v, w <- 0
           g <- sign(g) * sqrt(v * spike_threshold)          where |g| is larger and v > 0
           StableAdamW: r = 1 / max(1, sqrt(mean((g / max(sqrt(w) / sqrt(bc2), eps))^2)))
           lr <- lr * r, with the mean of finite terms over the tensor
    SGD    g <- g + p * wd                                   if wd is not 0
           m <- m * momentum + g * (1 - dampening)           with momentum
           p <- p - m * lr                                   Nesterov: g + m * momentum for m
    Lion   p <- p * (1 - lr * wd) - sign(m * b1 + g * (1 - b1)) * lr
           m <- m * b2 + g * (1 - b2)

Every operation is one IEEE operation in float32 (float64 for float64 parameters), rounded to
nearest, in this order and without fused multiply-add. Coefficients are computed in float64 and
rounded once. The terms of r are truncated to multiples of 1 / `SUM_SCALE`: their sum is exact in
any order. Nothing syncs with the device: if a step is skipped, `torch.where` keeps the old values.

Sources: Loshchilov and Hutter 2019 (AdamW), Reddi et al. 2018 (amsgrad), Sutskever et al. 2013
(SGD), Chen et al. 2023 (Lion), Huang et al. 2025 (SPAM, arXiv 2501.06842), Wortsman et al. 2023
(StableAdamW, arXiv 2304.13013).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.gradients.transfer import moved
from fastguard.optim.bits import from_remainder, narrowed, noise_key, split, stream, with_noise
from fastguard.optim.contract import (
    HYPER,
    KEY,
    N_COEFFICIENTS,
    RESET,
    SIGN,
    SPIKE,
    STATES,
    SUM_SCALE,
    Update,
)
from fastguard.optim.options import SPIKE_GRACE
from fastguard.stages.formulas import SMALLEST_FACTOR
from fastguard.stages.reference_units import summary_of, tensor_coefs


def update(update: Update) -> Tensor | None:
    """Takes the step of one bucket, or changes nothing if the step is skipped.

    Returns:
        float64 `(4,)`: what was clipped, see `reference_units.summary_of`; `(1, 0, 0, 0)` for a
        skipped step. None without limits of units.
    """
    coefficients = advance(update)
    if update.update_clipping:
        n = len(update.parameters)
        lower_lr(
            coefficients, torch.stack([update_ratio(update, i, coefficients[i]) for i in range(n)])
        )
    summary = _summary(update)
    for i in range(len(update.parameters)):
        _update_tensor(update, i, coefficients[i])
    return summary


def _summary(update: Update) -> Tensor | None:
    if update.units is None:
        return None
    limited = [i for i, n in enumerate(update.unit_counts) if n]
    if not limited:
        return None
    coefs = torch.cat([unit_coefs(update, i) for i in limited])
    return summary_of(torch.where(update.found_inf != 0.0, 1.0, coefs))


def unit_coefs(update: Update, i: int) -> Tensor:
    """Returns the coefficients of the units of a limited tensor, float64 `(n,)`."""
    units, n = update.units, update.unit_counts[i]
    assert units is not None
    numbers, scale = moved(units.numbers, update.device), units.inv_scale
    scale = None if scale is None else moved(scale, update.device)
    grad, weight = update.grads[i], update.parameters[i]
    return tensor_coefs(grad, weight, n, numbers, 2.0, units.propagates, scale)


def advance(update: Update) -> Tensor:
    """Counts the step of each tensor and computes its coefficients.

    Returns:
        float64 `(T, 13)`. After a skipped step, the coefficients must not be used.
    """
    taken = (update.found_inf == 0.0).float()  # a NaN means that the step is not taken
    steps = [step + 1.0 for step in update.steps]
    for step in update.steps:
        step.add_(taken)
    count = (
        torch.stack(steps).double()
        if steps
        else torch.ones(len(update.parameters), dtype=torch.float64, device=update.device)
    )
    groups = torch.tensor(list(update.group_ids), device=update.device)
    sizes = [float(p.numel()) for p in update.parameters]
    sizes = torch.tensor(sizes, dtype=torch.float64, device=update.device)
    return coefficients(update, update.hyper.index_select(0, groups), count, sizes)


def coefficients(update: Update, rows: Tensor, count: Tensor, sizes: Tensor) -> Tensor:
    """Computes the coefficients of n tensors.

    Args:
        update: The update.
        rows: float64 `(n, 12)`: the hyper-parameters of the tensors.
        count: float64 `(n,)`: the number of the step that each tensor takes, from 1.
        sizes: float64 `(n,)`: the number of elements of each tensor.

    Returns:
        float64 `(n, 13)`.
    """
    out = rows.new_zeros(len(rows), N_COEFFICIENTS)
    for column, value in enumerate(_formulas(update.algorithm, rows, count)):
        out[:, column] = value
    out[:, SIGN] = rows[:, HYPER.index("sign")]
    if update.rounding == "stochastic":
        out[:, KEY] = noise_key(rows[:, HYPER.index("seed")].long(), count.long()).double()
    if update.spike_aware:
        threshold, period, warmup = (rows[:, HYPER.index(name)] for name in HYPER[-3:])
        has_reset = (period > 0.0) & (count >= period)
        since = torch.fmod(count, torch.where(period > 0.0, period, math.inf))
        clips = (threshold > 0.0) & (since >= SPIKE_GRACE)
        out[:, SPIKE] = torch.where(clips, threshold, math.inf)
        out[:, RESET] = (has_reset & (since == 0.0)).double()
        cosine = torch.cos(since * (math.pi / (warmup + 1.0)))
        out[:, 5] *= torch.where(has_reset & (since < warmup), 1.0 - 0.495 * (1.0 + cosine), 1.0)
    if update.update_clipping:
        # A term is at most 1 / (1 - beta2), so the sum stays below 2**53 and is exact in float64.
        largest = sizes / (1.0 - rows[:, HYPER.index("beta2")])
        out[:, SUM_SCALE] = torch.exp2((52.5 - largest.log2()).floor().clamp(max=30.0))
    return out


def _formulas(algorithm: str, rows: Tensor, step: Tensor) -> list[Tensor]:
    """Returns the columns of `COEFFICIENTS`, in float64."""
    # The rows are contiguous, since torch uses another routine for the logarithm of strided
    # tensors.
    lr, b1, b2, eps, wd, momentum, dampening = rows.T.contiguous()[:7].unbind(0)
    decay = 1.0 - lr * wd
    if algorithm == "sgd":
        return [momentum, torch.where(step == 1.0, 1.0, 1.0 - dampening), wd, lr]
    if algorithm == "lion":
        return [b1, 1.0 - b1, b2, 1.0 - b2, lr, decay]
    bc1 = 1.0 - torch.exp2(step * torch.log2(b1))  # for beta 0, exp2(-inf) is 0
    bc2 = 1.0 - torch.exp2(step * torch.log2(b2))
    last = decay if algorithm == "adamw" else wd
    return [b1, 1.0 - b1, b2, 1.0 - b2, eps, lr / bc1, 1.0 / bc2.sqrt(), last]


class New(NamedTuple):
    """The weight and the state tensors after a step, in the dtype of the arithmetic."""

    weight: Tensor
    states: list[Tensor]


def _update_tensor(update: Update, i: int, coefficients: Tensor) -> None:
    dtype, p = update.dtype, update.parameters[i]
    key = coefficients[KEY].long()
    c = coefficients.to(dtype)
    g, values = gradient_and_states(update, i, c)
    weight = weight_of(update, i)
    old = weight if update.statistics is None else weight.clone()
    new = formula(update, weight, g, values, c)

    states = [update.states[n][i] for n in STATES[update.algorithm] if n in update.states]
    skip = update.found_inf != 0.0  # a NaN skips the step
    noise = None
    if update.rounding == "stochastic":
        noise = stream(key, update.counters[i], p)
    for number, (state, value) in enumerate(zip(states, new.states, strict=True), 1):
        _store(state, stored(value, state.dtype, noise, number), skip)
    _store_weight(update, i, new.weight, noise, skip)
    if update.statistics is not None:
        found = statistics(old, weight_of(update, i), p)
        update.statistics[i] = torch.where(skip, 0.0, found)


def statistics(old: Tensor, new: Tensor, parameter: Tensor) -> Tensor:
    """Returns `contract.STATISTICS`, float64 `(3,)`.

    Args:
        old, new: The exact weight before and after the step, in the dtype of the arithmetic.
        parameter: The parameter after the step.
    """
    sums = [torch.where(x.isfinite(), x, 0.0).double().square().sum() for x in (old, new - old)]
    return torch.stack([*sums, (~parameter.isfinite()).sum().double()])


def gradient_and_states(update: Update, i: int, c: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns what the formula reads besides the weight, in the dtype of the arithmetic."""
    dtype = update.dtype
    multiplier = update.multiplier[update.segment_ids[i]]
    if update.unit_counts and update.unit_counts[i]:
        n_dims = update.grads[i].dim()
        per_row = (-1, *[1] * (n_dims - 1)) if n_dims else ()
        multiplier = multiplier * unit_coefs(update, i).reshape(per_row)
    g = scaled(update.grads[i].to(dtype), multiplier, update.clean, c)
    names = [name for name in STATES[update.algorithm] if name in update.states]
    states = [update.states[name][i].to(dtype) for name in names]
    if update.spike_aware:
        states = [torch.where(c[RESET] != 0.0, 0.0, s) for s in states]
        g = without_spikes(g, states[1], c[SPIKE])
    return g, states


def without_spikes(g: Tensor, v: Tensor, threshold: Tensor) -> Tensor:
    """Limits elements of a gradient to the root of `threshold` times their second moment.

    An element whose second moment is 0 keeps its value. If the limit of 0 applied, the second
    moment would stay 0.
    """
    bound = root(v * threshold)
    return torch.where((v > 0.0) & (g.abs() > bound), torch.copysign(bound, g), g)  # a NaN is kept


def update_ratio(update: Update, i: int, coefficients: Tensor) -> Tensor:
    """Returns the mean over a tensor of `(g / max(sqrt(w) / sqrt(bc2), eps))^2`, float64 `()`."""
    c = coefficients.to(update.dtype)
    g, states = gradient_and_states(update, i, c)
    moments = states[1] * c[2] + (g * g) * c[3]
    if update.amsgrad:
        moments = torch.maximum(states[2], moments)
    x = g / torch.maximum(root(moments) * c[6], c[4])
    terms = (x * x) * c[SUM_SCALE]
    terms = torch.where(terms < math.inf, terms, 0.0).floor()  # False for NaN
    return terms.sum(dtype=torch.float64) / (coefficients[SUM_SCALE] * g.numel())


def lower_lr(coefficients: Tensor, ratios: Tensor) -> None:
    """Divides the learning rates in the coefficients of n tensors by `max(1, sqrt(ratio))`.

    Args:
        coefficients: float64 `(n, 13)`, written.
        ratios: float64 `(n,)`; NaN for an empty tensor, whose learning rate stays.
    """
    factors = torch.where(ratios > 1.0, 1.0 / ratios.sqrt(), 1.0)  # False for NaN
    coefficients[:, 5] *= factors
    coefficients[:, 7] = 1.0 - (1.0 - coefficients[:, 7]) * factors


def scaled(g: Tensor, multiplier: Tensor, clean: Tensor, c: Tensor) -> Tensor:
    """Returns the gradient, cleaned and scaled, as input of the formula.

    Args:
        g: The gradient, in the dtype of the arithmetic.
        multiplier: float64 `()`, or one factor per row.
        clean: float32 `()`.
        c: The coefficients, in the dtype of the arithmetic.
    """
    finite = g.abs() < float("inf")  # False for NaN
    g = torch.where((clean != 0.0) & ~finite, 0.0, g)
    # the comparison is False for NaN, which makes the result NaN
    tiny = multiplier.abs() < SMALLEST_FACTOR
    first = torch.where(tiny, SMALLEST_FACTOR, 1.0)
    second = torch.where(tiny, multiplier / SMALLEST_FACTOR, multiplier)
    return (g * first.to(g.dtype)) * (second.to(g.dtype) * c[SIGN])


def formula(update: Update, p: Tensor, g: Tensor, states: list[Tensor], c: Tensor) -> New:
    """Applies the elementwise formula in the module docstring."""
    if update.algorithm == "sgd":
        return _sgd(update, p, g, states, c)
    if update.algorithm == "lion":
        (m,) = states
        toward = m * c[0] + g * c[1]
        one = torch.where(toward > 0, 1.0, torch.where(toward < 0, -1.0, toward))  # a NaN is kept
        return New(p * c[5] - one * c[4], [m * c[2] + g * c[3]])
    if update.algorithm == "adam":
        g = torch.where(c[7] != 0.0, g + p * c[7], g)
    m, v = states[:2]
    m = m + (g - m) * c[1]
    v = v * c[2] + (g * g) * c[3]
    largest = torch.maximum(states[2], v) if update.amsgrad else v  # a NaN is kept
    step = (m * c[5]) / (root(largest) * c[6] + c[4])
    decayed = p * c[7] if update.algorithm == "adamw" else p
    return New(decayed - step, [m, v, largest] if update.amsgrad else [m, v])


def _sgd(update: Update, p: Tensor, g: Tensor, states: list[Tensor], c: Tensor) -> New:
    g = torch.where(c[2] != 0.0, g + p * c[2], g)
    if not states:
        return New(p - g * c[3], [])
    m = states[0] * c[0] + g * c[1]
    direction = g + m * c[0] if update.nesterov else m
    return New(p - direction * c[3], [m])


def root(x: Tensor) -> Tensor:
    """Returns the correctly rounded square root.

    On a CPU, torch's square root is off by 1 ulp for one number in five; numpy's is exact.
    """
    if x.device.type != "cpu" or not has_numbers(x):
        return x.sqrt()
    return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))


def weight_of(update: Update, i: int) -> Tensor:
    """Returns the exact weight, in the dtype of the arithmetic."""
    p = update.parameters[i]
    if update.master == "float32":
        return update.masters[i]
    if update.master == "remainder":
        return from_remainder(p, update.masters[i])
    return p.to(update.dtype)


def stored(value: Tensor, dtype: torch.dtype, noise: Tensor | None, number: int) -> Tensor:
    """Rounds a value to the dtype of a tensor that stores it.

    Args:
        value: The value, in the dtype of the arithmetic.
        dtype: Dtype of the tensor. Only 16-bit dtypes are rounded stochastically.
        noise: See `stream`; None: rounds to nearest.
        number: Number of the noise stream: 0 for the weight, then one per state.
    """
    if noise is None or dtype.itemsize != 2:
        return value.to(dtype)
    return narrowed(value, with_noise(noise, number), dtype)


def _store_weight(
    update: Update, i: int, value: Tensor, noise: Tensor | None, skip: Tensor
) -> None:
    p = update.parameters[i]
    if update.master is None:
        _store(p, stored(value, p.dtype, noise, 0), skip)
    elif update.master == "float32":
        _store(update.masters[i], value, skip)
        _store(p, value.to(p.dtype), skip)
    else:
        high, low = split(value)
        _store(update.masters[i], low, skip)
        _store(p, high, skip)


def _store(target: Tensor, value: Tensor, skip: Tensor) -> None:
    target.copy_(torch.where(skip, target, value))
