"""Stage 3, decide: clip, clean, skip or apply, from what was measured.

    clip_coef[s] = min(1, max_norm[s] / (norm[s] + 1e-6))            torch's formula
    found_inf    = 1 if the step is to be skipped, else 0            exactly, float32, shape ()
    multiplier   = clip_coef * inv_scale, and 1 for a skipped step   what apply multiplies by

A handful of numbers in, a handful out: no gradient is read. Every comparison says what NaN does.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastguard.errors import NonFiniteGradError, describe_culprits
from fastguard.gradients.tensor_kinds import PLAIN, WRAPPED
from fastguard.stages import backend
from fastguard.stages.measure import GradStats
from fastguard.stages.reduce import Signals
from fastguard.stages.spike_rules import GRAD_NORM, Rule, SpikeRule

NonFinite = Literal["skip", "zero", "raise", "propagate"]
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm
N_COUNTERS = 5  # of `GuardState`
# How torch begins the error of `error_if_nonfinite=True`; programs look for it.
TORCH_SENTENCE = (
    "The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it "
    "cannot be clipped. To disable this error and scale the gradients by the non-finite norm "
    "anyway, set `error_if_nonfinite=False`"
)
TINY = 2.0**-1022  # smallest normal float64: the least that a spike baseline spreads


class Reason(IntEnum):
    """Why a step was not simply applied; the first that holds, in this order.

    `LOSS_SCALE` stands in for `NONFINITE_GRAD` where lowering the loss scale cures the overflow.
    """

    NONE = 0
    NONFINITE_GRAD = 1
    NONFINITE_LOSS = 2
    GRAD_SPIKE = 3
    LOSS_SPIKE = 4
    LOSS_SCALE = 5

    @property
    def label(self) -> str | None:
        return self.name.lower() if self else None

    @property
    def is_incident(self) -> bool:
        """Whether the step calls for a reaction: an overflow that only lowers a loss scale is the
        scaler's own business.
        """
        return self not in (Reason.NONE, Reason.LOSS_SCALE)


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """What the user asked for.

    Attributes:
        max_norm: float64 `(S,)`, or `(1,)` for all segments: the limits; `inf` measures only. A
            tensor, because it may change between steps and must not cause a recompilation.
        nonfinite: What to do about NaN and Inf.
        rules: The spike rules in the order of their rows in `GuardState`.
        signals: The signal that each rule judges: `"grad_norm"` or a loss name.
        limited: Whether any limit is finite, as far as the host knows.
    """

    max_norm: Tensor
    nonfinite: NonFinite = "skip"
    rules: tuple[Rule, ...] = ()
    signals: tuple[str, ...] = ()
    limited: bool = True

    def may_change(self, signals: Signals) -> bool:
        """Whether a verdict can have anything for apply to do; known without looking at one."""
        return (
            self.limited
            or self.nonfinite == "zero"
            or signals.inv_scale is not None
            or any(rule.action == "clip" for rule in self.rules)
        )


@dataclass(slots=True)
class GuardState:
    """What outlives a step, on the device; updated in place, so that a CUDA graph may hold it.

    Attributes:
        counters: int64 `(5,)`: steps decided, applied, skipped (these never reset); incidents
            skipped in a row (back to 0 when a step is applied); and skipped to lower a loss scale
            (never reset, counted in `skipped`, and no incident).
        windows: float64 `(K, W)`: a ring of accepted values for each of K rules.
        rings: int64 `(K, 3)`: values in the ring (at most its window), where the next one goes, and
            consecutive values above the threshold (back to 0 at the first that is not); from the
            window's length on they are accepted, until the baseline has caught up.
        undo: A list: what puts back the changes of a decision is added to it. None: they stay.
    """

    counters: Tensor
    windows: Tensor
    rings: Tensor
    undo: list[Callable[[], None]] | None = field(default=None, compare=False, repr=False)

    def to(self, device: torch.device) -> GuardState:
        """The same on another device."""
        return GuardState(self.counters.to(device), self.windows.to(device), self.rings.to(device))

    def note_all(self) -> None:
        """Copies everything for `undo`, before a decision changes it."""
        if self.undo is not None:
            before = self.counters.clone(), self.windows.clone(), self.rings.clone()
            self.undo.append(partial(self._restore, *before))

    def _restore(self, counters: Tensor, windows: Tensor, rings: Tensor) -> None:
        self.counters.copy_(counters)
        self.windows.copy_(windows)
        self.rings.copy_(rings)

    def put_back(self, before: Tensor) -> None:
        """Restores what a decision has changed.

        Args:
            before: float64 `(5 + 4 * K,)`: the counters, and of each rule its row of `rings` and
                the value that was overwritten in `windows`.
        """
        of_rules = before[N_COUNTERS:].view(-1, 4)
        self.counters.copy_(before[:N_COUNTERS])
        if len(of_rules):
            self.rings.copy_(of_rules[:, :3])
        if len(of_rules) and self.windows.shape[1]:
            self.windows.scatter_(1, of_rules[:, 1:2].long(), of_rules[:, 3:])

    @staticmethod
    def fresh(policy: Policy, device: torch.device) -> GuardState:
        """The state before the first step."""
        windows = [rule.window for rule in policy.rules if isinstance(rule, SpikeRule)]
        n_rules = len(policy.rules)
        return GuardState(
            torch.zeros(N_COUNTERS, dtype=torch.int64, device=device),
            torch.zeros(n_rules, max(windows, default=0), dtype=torch.float64, device=device),
            torch.zeros(n_rules, 3, dtype=torch.int64, device=device),
        )


class Known(NamedTuple):
    """What a decision that was taken on the host knows, in plain Python values.

    Attributes:
        total_norm, skipped, cleaned, spikes, thresholds: As in `Verdict`.
        clip_coef: The smallest of all segments.
        changes_gradients: Whether there is anything for apply to do.
        reason: Why the step was not simply applied.
        nonfinite_counts: NaN, +Inf and -Inf of the whole model.
        losses: The losses that were judged, by name.
        step, consecutive_skips: Counters of the state after this step; 0 without a state.
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


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done with a step. Tensors on the device of the stats.

    Attributes:
        clip_coef: float64 `(S,)`: at most 1; NaN only in propagate mode.
        multiplier: float64 `(S,)`: what apply multiplies by; 1 touches nothing.
        found_inf: float32 `()`: exactly 1.0 if the step is skipped, else exactly 0.0.
        clean: float32 `()`: 1 if apply replaces non-finite elements by 0.
        reason: int64 `()`: a `Reason`.
        total_norm: float64 `()`: the norm of the finite elements before clipping.
        torch_norm: float64 `()`: the same as torch gives it: NaN or Inf if an element is.
        spikes: bool `(K,)`: which rules saw a spike.
        thresholds: float64 `(K,)`: what each rule compared with; inf during its warm-up.
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


@dataclass(frozen=True, slots=True)
class HostVerdict(Verdict):
    """A verdict that was reached on the host, which need not read the tensors to know it."""

    known: Known = field(repr=False)


def decide(stats: GradStats, signals: Signals, state: GuardState | None, policy: Policy) -> Verdict:
    """Takes the decision and brings `state` up to date.

    Args:
        stats: What all ranks measured.
        signals: Losses and scaler.
        state: Counters and baselines, changed in place; None for a single call, without rules.
        policy: What the user asked for. In raise mode the caller has raised before.

    Returns:
        The verdict; nothing waits for a GPU.
    """
    if stats.kind is not PLAIN:
        return backend.reference().decide(stats, signals, state, policy)
    if stats.summary.device.type == "cpu":
        return _on_the_host()(stats, signals, state, policy)
    return backend.stages(stats.summary.device).decide(stats, signals, state, policy)


@functools.cache
def _on_the_host() -> Callable[..., Verdict]:
    """The twin for a CPU, which imports what is above. Kept, as `backend.stages` keeps its own: to
    find it again at each step takes 6 µs behind a model that filled the caches.
    """
    return importlib.import_module("fastguard.stages.cpu.decide").decide


def clip_coefficients(norms: Tensor, max_norm: Tensor) -> Tensor:
    """`min(1, max_norm / (norm + 1e-6))`; a limit of inf gives 1 for every norm, NaN a NaN."""
    coef = (max_norm / (norms + EPS)).clamp(max=1.0)  # NaN stays NaN
    return coef.masked_fill(max_norm == math.inf, 1.0)


def propagated_norms(norms: Tensor, nonfinite_counts: Tensor) -> Tensor:
    """The norms as torch gives them: NaN if any element is NaN, else inf if any is infinite.

    Args:
        norms: float64 `(S,)`, of the finite elements.
        nonfinite_counts: `(3, S)`: NaN, +Inf, -Inf.
    """
    nan = nonfinite_counts.select(0, 0) > 0
    infinite = nonfinite_counts.narrow(0, 1, 2).sum(0) > 0
    return torch.where(nan, math.nan, torch.where(infinite, math.inf, norms))


def torch_total_norm(stats: GradStats) -> Tensor:
    """float64 `()`: the norm of the whole model as torch gives it, NaN or Inf if an element is."""
    on_host = stats.kind is PLAIN and stats.summary.device.type == "cpu"
    if on_host and not stats.segment_counts.any():
        return stats.total_norm64
    return propagated_norms(stats.total_norm64, stats.segment_counts.sum(1))


def only_lowers_scale(signals: Signals) -> Tensor | None:
    """bool `()`: an overflow that a lower loss scale cures, and that the scaler sees to. None: no
    loss scale is known.

    A non-finite loss is nothing that the scale of its gradients could cure.
    """
    if signals.found_inf is None or signals.scale_falls is None:
        return None
    sound = signals.losses.isfinite()  # NaN is not
    if signals.given is not None:
        sound = sound | ~signals.given
    return (signals.found_inf > 0) & signals.scale_falls & sound.all()


def raise_if_nonfinite(
    stats: GradStats, signals: Signals | None = None, *, as_torch: bool = False
) -> None:
    """Raises before anything is changed. Waits for a GPU.

    Args:
        stats: The stats of the step.
        signals: Its losses and its scaler; None: only gradients matter.
        as_torch: Begin the message with torch's own sentence, as `error_if_nonfinite=True` does.

    Raises:
        NonFiniteGradError: A gradient element or a loss is NaN or Inf, and a lower loss scale does
            not cure it; or the elements are finite and their norm is beyond float64.
    """
    if stats.kind is not PLAIN:
        _raise_if_layers_are_bad(stats, as_torch)
        return
    if signals is not None and (lowers := only_lowers_scale(signals)) is not None and lowers:
        return
    nan, posinf, neginf = (int(n) for n in stats.segment_counts.sum(1).tolist())
    if nan or posinf or neginf:
        culprits = stats.culprits()
        where = describe_culprits(culprits) if culprits else _elsewhere(signals)
        message = (
            f"gradients are non-finite ({nan} NaN, {posinf} +Inf, {neginf} -Inf) in {where}; "
            "nothing was changed"
        )
        raise NonFiniteGradError(_as_told(message, stats, as_torch), culprits)
    on_ranks = signals is not None and signals.bad_ranks is not None
    may_exceed = stats.rooted or stats.norm_type < 1.0 or on_ranks
    if may_exceed and stats.total_norm64.item() == math.inf:
        message = (
            f"the norm of order {stats.norm_type} of the gradients is beyond float64, although "
            "every element is finite; nothing was changed"
        )
        raise NonFiniteGradError(_as_told(message, stats, as_torch), [])
    losses = [] if signals is None else signals.losses.tolist()  # 0 where no rank gave one
    bad = [(i, loss) for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if signals is not None and bad:
        # By place: a rank may know the names of none that others gave.
        listed = ", ".join(f"{signals.loss_names[i]}={loss}" for i, loss in bad)
        raise NonFiniteGradError(f"the loss is non-finite: {listed}; nothing was changed")


def _raise_if_layers_are_bad(stats: GradStats, as_torch: bool) -> None:
    """As above for gradients that are not plain: which ones are bad need not have one answer.

    Placeholders hold nothing to look at.
    """
    if stats.kind is WRAPPED and stats.found_nonfinite.item():
        message = "gradients are non-finite; nothing was changed"
        raise NonFiniteGradError(_as_told(message, stats, as_torch))


def _as_told(message: str, stats: GradStats, as_torch: bool) -> str:
    if not as_torch:
        return message
    return f"{TORCH_SENTENCE.format(norm_type=stats.norm_type)}. Here {message}"


def _elsewhere(signals: Signals | None) -> str:
    n, rank = (0, None) if signals is None else signals.culprit_rank
    return f"parameters of rank {rank}" if n == 1 else f"parameters of {n or 'other'} ranks"


def signal_values(stats: GradStats, signals: Signals, names: Sequence[str]) -> Tensor:
    """float64 `(K,)`: the value of each named signal; NaN for a loss that was not given."""
    losses = signals.losses
    if signals.given is not None:
        losses = torch.where(signals.given, losses, math.nan)
    known = {GRAD_NORM: stats.total_norm64}
    known.update(zip(signals.loss_names, losses, strict=True))
    missing = torch.full((), math.nan, dtype=torch.float64, device=stats.summary.device)
    return torch.stack([known.get(name, missing) for name in names])
