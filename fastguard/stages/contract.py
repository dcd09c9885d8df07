"""The types passed between stages: signals, policy, guard state, verdict. See `grad_stats` too."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import PLAIN, lasting
from fastguard.stages.agc import AGC, UnitLimits, UnitSummary
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.limit_rules import AdaptiveLimit, Numbers
from fastguard.stages.reason import Reason
from fastguard.stages.spike_rules import GRAD_NORM, Rule


@dataclass(frozen=True, slots=True)
class Signals:
    """Inputs of the decision besides the gradients. All tensors are on the device of the stats.

    Attributes:
        losses: float64 `(L,)`: the losses of this step, means over micro-batches and ranks.
        loss_names: The L names of the losses.
        inv_scale: float64 `()`: the factor that unscales the gradients; None: they are unscaled.
        found_inf: float32 `()`: above 0 if a loss scaler found non-finite gradients on any device;
            None without a scaler.
        given: bool `(L,)`: which losses any rank passed in this step; None: all of them (always
            None on a CPU).
        bad_ranks: float64 `(2,)`: number of ranks that hold non-finite values, and the sum of their
            rank numbers; None in a single process.
        local_nonfinite: float64 `()`: above 0 if gradients of this rank were non-finite before the
            ranks summed them, see `RankWatch`. None: this was not checked, so the current gradients
            decide.
        scale_falls: bool `()`: whether the loss scale is above its minimum, so that the scaler
            lowers it after an overflow; with several ranks, whether this holds on every rank with
            non-finite values. None: the scale is unknown.
        watched: float64 `(W,)`: values of the watched quantities; after the exchange, their sums
            over the ranks. None: nothing is watched in this step.
    """

    losses: Tensor
    loss_names: Sequence[str] = ()
    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None
    given: Tensor | None = None
    bad_ranks: Tensor | None = None
    local_nonfinite: Tensor | None = None
    scale_falls: Tensor | None = None
    watched: Tensor | None = None

    @property
    def culprit_rank(self) -> tuple[int, int | None]:
        """Number of ranks that hold non-finite values, and the rank if there is just one.

        Waits for a GPU.
        """
        if self.bad_ranks is None:
            return 0, None
        n, number = (int(x) for x in self.bad_ranks.tolist())
        return n, number if n == 1 else None

    @staticmethod
    def none(device: torch.device) -> Signals:
        """Returns signals without losses and scaler."""
        return _nothing(device)

    @staticmethod
    def none_beside(stats: GradStats) -> Signals:
        """Returns signals without losses and scaler, with tensors of the same kind as the stats."""
        if stats.kind is PLAIN:
            return _nothing(stats.summary.device)
        return Signals(stats.summary.new_empty(0))


@functools.cache
def _nothing(device: torch.device) -> Signals:
    """The empty tensor is cached, since creating it takes 2 µs."""
    with lasting():
        return Signals(torch.empty(0, dtype=torch.float64, device=device))


NonFinite = Literal["skip", "zero", "raise", "propagate"]

N_COUNTERS = 5  # number of counters in `GuardState`


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """The settings of the guard that decide about a step.

    Attributes:
        max_norm: float64 `(S,)`, or `(1,)` for all segments: the limits; `inf`: measure only. It is
            a tensor, so that a change between steps causes no recompilation.
        nonfinite: How to handle NaN and Inf.
        rules: The spike rules, in the order of their rows in `GuardState`.
        signals: The signal that each rule applies to: `"grad_norm"` or a loss name.
        limited: Whether any limit may be finite, as far as the host knows.
        joint_limit: The norm of the whole model if every segment is at its limit; inf: no limit. A
            float64 `()` tensor if each decision updates it.
        adaptive: The rule that writes `max_norm`, of shape `(S,)`, in each step; None: fixed.
        own: float64 `(S,)`: fixed limits of the segments that the rule does not cover, and NaN for
            all others; None: the rule covers all segments.
        on_host: Whether the rule computes in Python floats, as for one segment on a CPU; if so,
            `max_norm` and `joint_limit` are not written.
        agc: Limits of units, see `fastguard.stages.units`; None: no such limits.
    """

    max_norm: Tensor
    nonfinite: NonFinite = "skip"
    rules: tuple[Rule, ...] = ()
    signals: tuple[str, ...] = ()
    limited: bool = True
    joint_limit: float | Tensor = math.inf
    adaptive: AdaptiveLimit | None = None
    own: Tensor | None = None
    on_host: bool = False
    agc: AGC | None = None

    def may_change(self, signals: Signals) -> bool:
        """Whether the gradients of this step may have to be changed, known before the verdict."""
        return (
            self.limited
            or self.nonfinite == "zero"
            or signals.inv_scale is not None
            or any(rule.action == "clip" for rule in self.rules)
        )


@dataclass(slots=True)
class GuardState:
    """State that persists between steps, on the device; updated in place, as CUDA graphs need.

    Attributes:
        counters: int64 `(5,)`: steps decided, applied, skipped (never reset); consecutive skipped
            incidents (reset to 0 when a step is applied); steps skipped to lower a loss scale
            (never reset, included in `skipped`, not incidents).
        windows: float64 `(K, W)`: one ring buffer of accepted values per rule, for K rules.
        rings: int64 `(K, 3)`: number of values in the ring (at most its window), index of the next
            value, and number of consecutive values above the threshold (reset to 0 by the first
            value that is not above). After `window` such values, values above the threshold no
            longer count as spikes until the baseline has caught up.
        limits: float64 `(1 + N, S)`: number of norms that an adaptive limit has learned per
            segment, and its N numbers; `(0, 0)` without an adaptive limit.
        undo: A list to which each decision appends calls that revert its changes; None: changes
            cannot be reverted.
        host_limits: `limits` and a view of its memory on a CPU, see `adaptive_limits.numbers_of`.
    """

    counters: Tensor
    windows: Tensor
    rings: Tensor
    limits: Tensor
    undo: list[Callable[[], object]] | None = field(default=None, compare=False, repr=False)
    host_limits: tuple[Tensor, Numbers] | None = field(default=None, compare=False, repr=False)

    def to(self, device: torch.device) -> GuardState:
        """Returns a copy on another device, without `undo`."""
        counters, windows, rings, limits = (
            t.to(device) for t in (self.counters, self.windows, self.rings, self.limits)
        )
        return GuardState(counters, windows, rings, limits)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies without `undo`, which belongs to a step of the original."""
        return GuardState, (self.counters, self.windows, self.rings, self.limits)

    def note_all(self) -> None:
        """Saves everything for `undo`, before a decision changes it."""
        if self.undo is not None:
            before = self.counters.clone(), self.windows.clone(), self.rings.clone()
            self.undo.append(partial(self._restore, *before))

    def _restore(self, counters: Tensor, windows: Tensor, rings: Tensor) -> None:
        self.counters.copy_(counters)
        self.windows.copy_(windows)
        self.rings.copy_(rings)

    def put_back(self, before: Tensor) -> None:
        """Reverts the changes of a decision.

        Args:
            before: float64 `(5 + 4 * K,)`: the previous counters, and per rule its previous row of
                `rings` and the overwritten value in `windows`.
        """
        of_rules = before[N_COUNTERS:].view(-1, 4)
        self.counters.copy_(before[:N_COUNTERS])
        if len(of_rules):
            self.rings.copy_(of_rules[:, :3])
        if len(of_rules) and self.windows.shape[1]:
            self.windows.scatter_(1, of_rules[:, 1:2].long(), of_rules[:, 3:])

    @staticmethod
    def fresh(policy: Policy, device: torch.device) -> GuardState:
        """Returns the state before the first step."""
        windows = [rule.window for rule in policy.rules]
        n_rules = len(policy.rules)
        return GuardState(
            torch.zeros(N_COUNTERS, dtype=torch.int64, device=device),
            torch.zeros(n_rules, max(windows, default=0), dtype=torch.float64, device=device),
            torch.zeros(n_rules, 3, dtype=torch.int64, device=device),
            fresh_limits(policy, device),
        )


def fresh_limits(policy: Policy, device: torch.device) -> Tensor:
    """Returns `GuardState.limits` before the first step."""
    if policy.adaptive is None:
        return torch.zeros(0, 0, dtype=torch.float64, device=device)
    numbers = torch.tensor([0.0, *policy.adaptive.initial], dtype=torch.float64, device="cpu")
    return numbers[:, None].repeat(1, policy.max_norm.shape[0]).to(device)


class Known(NamedTuple):
    """The values of a decision made on the host, as Python numbers.

    Attributes:
        total_norm, skipped, cleaned, spikes, thresholds: As in `Verdict`.
        clip_coef: The smallest coefficient of all segments.
        changes_gradients: Whether the apply stage changes any gradient.
        reason: Why the step was not applied unchanged.
        nonfinite_counts: Numbers of NaN, +Inf and -Inf elements of the whole model.
        losses: The losses that the decision used, by name.
        step, consecutive_skips: Counters after this step; 0 without a state.
        limit: The limit set by an adaptive rule; None: `Policy.joint_limit` applies.
    """

    total_norm: float
    clip_coef: float
    skipped: bool
    cleaned: bool
    changes_gradients: bool
    reason: Reason
    nonfinite_counts: Sequence[int]
    losses: dict[str, float]
    spikes: Sequence[bool]
    thresholds: Sequence[float]
    step: int
    consecutive_skips: int
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision about one step: the type of `GuardedOptimizer.last`.

    All fields are tensors on the device of the gradients. Reading one (`.item()`, `float`) waits
    for the device; keeping it or passing it to another operation does not. S is the number of
    segments (1 for `clip_scope="global"`), K the number of spike rules.

    Attributes:
        clip_coef: float64 `(S,)`: the clip coefficients, at most 1; NaN only in propagate mode.
        multiplier: float64 `(S,)`: the factor that the apply stage multiplies by; 1: no change.
        found_inf: float32 `()`: exactly 1.0 if the step is skipped, else exactly 0.0.
        clean: float32 `()`: 1 if the apply stage replaces non-finite elements with 0.
        reason: int64 `()`: a `Reason`.
        total_norm: float64 `()`: norm of the finite elements before clipping.
        torch_norm: float64 `()`: the norm as torch computes it, which is NaN or Inf if any element
            is.
        spikes: bool `(K,)`: which rules detected a spike.
        thresholds: float64 `(K,)`: the threshold of each rule; inf during its warm-up.
        changes: float32 `()`: 0 if no gradient has to be changed; None: not known.
        units: The limits of units, if the update applies them; `clip_coef` contains the
            coefficients of these units only after the step. None: the update applies no limits.
        clipped_units: What the limits of units have clipped, per bucket; empty without `AGC`.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.1), max_norm=2.5)
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> opt.step()
        >>> isinstance(opt.last, fastguard.Verdict)
        True
        >>> opt.last.total_norm.item(), round(opt.last.clip_coef.item(), 3)
        (5.0, 0.5)
    """

    clip_coef: Tensor
    multiplier: Tensor
    found_inf: Tensor
    clean: Tensor
    reason: Tensor
    total_norm: Tensor
    torch_norm: Tensor
    spikes: Tensor
    thresholds: Tensor
    changes: Tensor | None = field(default=None, kw_only=True, compare=False)
    units: UnitLimits | None = field(default=None, kw_only=True, compare=False, repr=False)
    clipped_units: tuple[UnitSummary, ...] = field(
        default=(), kw_only=True, compare=False, repr=False
    )


@dataclass(frozen=True, slots=True)
class HostVerdict(Verdict):
    """A verdict that was computed on the host, with its values as Python numbers in `known`."""

    known: Known = field(repr=False)


def signal_values(stats: GradStats, signals: Signals, names: Sequence[str]) -> Tensor:
    """Returns the value of each named signal, float64 `(K,)`; NaN for a loss not passed."""
    losses = signals.losses
    if signals.given is not None:
        losses = torch.where(signals.given, losses, math.nan)
    known = {GRAD_NORM: stats.total_norm64}
    known.update(zip(signals.loss_names, losses, strict=True))
    missing = torch.full((), math.nan, dtype=torch.float64, device=stats.summary.device)
    return torch.stack([known.get(name, missing) for name in names])


def only_lowers_scale(signals: Signals) -> Tensor | None:
    """Returns whether the only fault is an overflow that the scaler fixes by lowering its scale.

    A lower scale does not fix a non-finite loss.

    Returns:
        bool `()`; None: the loss scale is unknown.
    """
    if signals.found_inf is None or signals.scale_falls is None:
        return None
    sound = signals.losses.isfinite()  # `isfinite` is False for NaN
    if signals.given is not None:
        sound = sound | ~signals.given
    return (signals.found_inf > 0) & signals.scale_falls & sound.all()
