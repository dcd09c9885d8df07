"""What one stage hands to the next: stats, signals, the policy, the state, the verdict."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastguard.errors import Culprit
from fastguard.gradients.tensor_kinds import PLAIN, Kind, has_numbers, lasting
from fastguard.stages.agc import AGC
from fastguard.stages.formulas import norm_of_norms, propagated_norms, root
from fastguard.stages.limit_rules import AdaptiveLimit
from fastguard.stages.reason import Reason
from fastguard.stages.spike_rules import GRAD_NORM, Rule


@dataclass(frozen=True, slots=True)
class GradStats:
    """What one read of the gradients says. All tensors live on one device.

    Attributes:
        summary: float64 `(4, S)`: of each segment the power sum (or norm, see `rooted`) and how
            many elements are NaN, +Inf and -Inf. One tensor, because that is what ranks exchange.
        counts: int64 `(3, T)`: NaN, +Inf and -Inf of each tensor on this rank.
        norm_type: p.
        names: One name a tensor, or None: then they are called `parameter i`.
        float64: Whether any gradient is float64; `total_norm` is then float64 too.
        rooted: Whether the first row of `summary` holds norms in place of power sums: these could
            leave float64. False for the inf-norm, whose "power sum" is the norm.
        kind: That of the gradients, and so of the tensors here.
    """

    summary: Tensor
    counts: Tensor
    norm_type: float
    names: Sequence[str] | None = None
    float64: bool = False
    rooted: bool = False
    kind: Kind = PLAIN

    @property
    def power_sum(self) -> Tensor:
        """float64 `(S,)`: sum of |g|^p over the finite elements; for the inf-norm their maximum.

        Where it leaves float64 it is inf or 0; `segment_norms` are right there too.
        """
        values = self._row(self.summary, 0)
        return values.pow(self.norm_type) if self.rooted else values

    @property
    def segment_counts(self) -> Tensor:
        """float64 `(3, S)`: how many elements of each segment are NaN, +Inf, -Inf."""
        return self.summary[1:] if self.kind is PLAIN else self.summary.narrow(0, 1, 3)

    @property
    def nan_count(self) -> Tensor:
        """int64 `(T,)`: NaN elements of each tensor."""
        return self._row(self.counts, 0)

    @property
    def posinf_count(self) -> Tensor:
        """int64 `(T,)`: +Inf elements of each tensor."""
        return self._row(self.counts, 1)

    @property
    def neginf_count(self) -> Tensor:
        """int64 `(T,)`: -Inf elements of each tensor."""
        return self._row(self.counts, 2)

    @property
    def segment_norms(self) -> Tensor:
        """float64 `(S,)`: the norm of the finite elements of each segment."""
        values = self._row(self.summary, 0)
        return values if self.rooted else root(values, self.norm_type)

    @property
    def total_norm64(self) -> Tensor:
        """float64 `()`: the norm of the finite elements of the whole model."""
        summary = self.summary
        if summary.numel() == 4:  # one segment
            value = summary[0, 0] if self.kind is PLAIN else summary.select(0, 0).select(0, 0)
            return value if self.rooted else root(value, self.norm_type)
        values = self._row(summary, 0)
        if self.rooted:
            return norm_of_norms(values, self.norm_type)
        whole = values.amax() if self.norm_type == math.inf and values.numel() else values.sum()
        return root(whole, self.norm_type)

    @property
    def total_norm(self) -> Tensor:
        """float32 `()` (float64 if any gradient is): the norm of all finite elements."""
        norm = self.total_norm64
        return norm if self.float64 else norm.float()

    @property
    def found_nonfinite(self) -> Tensor:
        """float32 `()`: 1 if any element of the whole model is NaN or Inf, else 0."""
        return (self.segment_counts.sum() > 0).float()

    def _row(self, t: Tensor, i: int) -> Tensor:
        # Indexing is quicker, but asks the device, which need not be there for placeholders.
        return t[i] if self.kind is PLAIN else t.select(0, i)

    def culprits(self) -> list[Culprit]:
        """`(name, nan, posinf, neginf)` of each tensor with non-finite elements. Waits.

        Placeholders have none.
        """
        if not has_numbers(self.counts):
            return []
        counts = self.counts.cpu()
        bad = counts.sum(0).nonzero().squeeze(1).tolist()
        rows = counts[:, bad].T.tolist()
        return [(self.name(i), *row) for i, row in zip(bad, rows, strict=True)]

    def name(self, i: int) -> str:
        return self.names[i] if self.names is not None else f"parameter {i}"


@dataclass(frozen=True, slots=True)
class Signals:
    """What a step knows besides its gradients. All tensors live where the stats do.

    Attributes:
        losses: float64 `(L,)`: the losses of this step, means over micro-batches and ranks.
        loss_names: Their L names.
        inv_scale: float64 `()`, what gradients are still to be multiplied by; None if nothing is.
        found_inf: float32 `()`, > 0 if a loss scaler found non-finite gradients on any device; None
            without a scaler.
        given: bool `(L,)`: which losses some rank gave at this step; None: all, always on a CPU.
        bad_ranks: float64 `(2,)`: how many ranks hold something non-finite, and the sum of their
            numbers; None in one process.
        born_here: float64 `()`, > 0 if gradients of this rank were bad before the ranks added
            theirs up: see `RankWatch`. None: nobody looked; then what it holds now tells.
        scale_falls: bool `()`: the loss scale is above its floor, so that the scaler lowers it
            after an overflow; on several ranks, this holds on all ranks that hold something
            non-finite. None: no scale is known.
        watched: float64 `(W,)`: what watched quantities add up over the ranks; the sums, once the
            ranks have exchanged them. None: this step is not watched.
    """

    losses: Tensor
    loss_names: Sequence[str] = ()
    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None
    given: Tensor | None = None
    bad_ranks: Tensor | None = None
    born_here: Tensor | None = None
    scale_falls: Tensor | None = None
    watched: Tensor | None = None

    @property
    def culprit_rank(self) -> tuple[int, int | None]:
        """How many ranks hold something non-finite, and which one if it is one. Waits for a GPU."""
        if self.bad_ranks is None:
            return 0, None
        n, number = (int(x) for x in self.bad_ranks.tolist())
        return n, number if n == 1 else None

    @staticmethod
    def none(device: torch.device) -> Signals:
        """No losses, no scaler."""
        return _nothing(device)

    @staticmethod
    def none_beside(stats: GradStats) -> Signals:
        """The same for stats of any kind."""
        if stats.kind is PLAIN:
            return _nothing(stats.summary.device)
        return Signals(stats.summary.new_empty(0))


@functools.cache
def _nothing(device: torch.device) -> Signals:
    """Made once: it would cost each clipping 2 µs. There is nothing in it to write to, or to wait
    for.
    """
    with lasting():
        return Signals(torch.empty(0, dtype=torch.float64, device=device))


NonFinite = Literal["skip", "zero", "raise", "propagate"]

N_COUNTERS = 5  # of `GuardState`


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
        joint_limit: The norm of the whole model where the norm of every segment is at its limit;
            inf: there is none. A tensor, float64 `()`, where each decision writes it.
        adaptive: The rule that writes `max_norm`, then `(S,)`, anew at each step; None: fixed.
        own: float64 `(S,)`: the fixed limits of segments that the rule is not for, NaN for those
            that it is for; None: it is for all.
        on_host: Whether the rule decides in Python floats: it can, for one segment on a CPU. Then
            neither `max_norm` nor `joint_limit` is written.
        agc: Limits of units, see `fastguard.stages.units`; None: there are none.
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
        limits: float64 `(1 + N, S)`: how many norms of each segment an adaptive limit has learned,
            and its N numbers; `(0, 0)` without one.
        undo: A list: what puts back the changes of a decision is added to it. None: they stay.
    """

    counters: Tensor
    windows: Tensor
    rings: Tensor
    limits: Tensor
    undo: list[Callable[[], object]] | None = field(default=None, compare=False, repr=False)

    def to(self, device: torch.device) -> GuardState:
        """The same on another device."""
        counters, windows, rings, limits = (
            t.to(device) for t in (self.counters, self.windows, self.rings, self.limits)
        )
        return GuardState(counters, windows, rings, limits)

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
        windows = [rule.window for rule in policy.rules]
        n_rules = len(policy.rules)
        return GuardState(
            torch.zeros(N_COUNTERS, dtype=torch.int64, device=device),
            torch.zeros(n_rules, max(windows, default=0), dtype=torch.float64, device=device),
            torch.zeros(n_rules, 3, dtype=torch.int64, device=device),
            fresh_limits(policy, device),
        )


def fresh_limits(policy: Policy, device: torch.device) -> Tensor:
    """`GuardState.limits` before the first step."""
    if policy.adaptive is None:
        return torch.zeros(0, 0, dtype=torch.float64, device=device)
    numbers = torch.tensor([0.0, *policy.adaptive.initial], dtype=torch.float64, device="cpu")
    return numbers[:, None].repeat(1, policy.max_norm.shape[0]).to(device)


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
        limit: What an adaptive rule allowed the norm; None: `Policy.joint_limit` says it.
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
    """What was decided about one step: the type of `GuardedOptimizer.last`.

    All fields are tensors on the device of the gradients. Reading one (`.item()`, `float`) waits
    for the device; keeping it or handing it to another operation does not. S is the number of
    segments (1 for `clip_scope="global"`), K the number of spike rules.

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
        changes: float32 `()`: 0 if apply has nothing to do in any segment; None: not known.

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


@dataclass(frozen=True, slots=True)
class HostVerdict(Verdict):
    """A verdict that was reached on the host, which need not read the tensors to know it."""

    known: Known = field(repr=False)


def torch_total_norm(stats: GradStats) -> Tensor:
    """float64 `()`: the norm of the whole model as torch gives it, NaN or Inf if an element is."""
    on_host = stats.kind is PLAIN and stats.summary.device.type == "cpu"
    if on_host and not stats.segment_counts.any():
        return stats.total_norm64
    return propagated_norms(stats.total_norm64, stats.segment_counts.sum(1))


def signal_values(stats: GradStats, signals: Signals, names: Sequence[str]) -> Tensor:
    """float64 `(K,)`: the value of each named signal; NaN for a loss that was not given."""
    losses = signals.losses
    if signals.given is not None:
        losses = torch.where(signals.given, losses, math.nan)
    known = {GRAD_NORM: stats.total_norm64}
    known.update(zip(signals.loss_names, losses, strict=True))
    missing = torch.full((), math.nan, dtype=torch.float64, device=stats.summary.device)
    return torch.stack([known.get(name, missing) for name in names])


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
