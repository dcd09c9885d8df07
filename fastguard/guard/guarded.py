"""`GuardedOptimizer`: an optimizer whose steps are measured, decided, and applied or skipped.

One step is four lines: measure, reduce, decide, apply; then the wrapped optimizer obeys. Everything
else here is bookkeeping: what the step knows (losses, scaler), what it leaves behind (records), and
being a `torch.optim.Optimizer` to schedulers, scalers and trainers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.functional.arguments import warn_of_zero
from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import watched
from fastguard.guard.announcement import announce_guard
from fastguard.guard.arguments import (
    MODES,
    check_budget,
    check_choice,
    check_optimizer,
    check_settings,
    check_whole_step,
    keywords_only,
    named_parameters_of,
)
from fastguard.guard.clamp import Clamped
from fastguard.guard.clip_scope import (
    SCOPES,
    ClipScope,
    Limit,
    checked_limit,
    limits,
    names_by_tensor,
    policy_of,
)
from fastguard.guard.compiled_state import check_compiled_optimizer
from fastguard.guard.flat_checks import check_flat_dtypes, check_flat_optimizer
from fastguard.guard.grad_scaler import HandedOver, handed_over, longest_search, tell_scaler
from fastguard.guard.inner_step import ClosureNeeded, StepCall, StepSignature
from fastguard.guard.lifetime import saved_with
from fastguard.guard.param_gradients import Gradients
from fastguard.guard.rank_arguments import arguments_of, places_of
from fastguard.guard.reporting import KnownRun
from fastguard.guard.state_dict import guard_state, inner_state, parts, torch_dcp
from fastguard.guard.step_hooks import with_own_hooks, without_pre_hooks_of_all
from fastguard.guard.step_in_flight import StepInFlight
from fastguard.guard.stepper import stepper_asked_for
from fastguard.guard.unit_clipping import UnitClipping
from fastguard.guard.watch.watch import WATCH_EVERY, WatchName, check_road, read_step, watch_of
from fastguard.guard.whole_step import WholeStep
from fastguard.ranks.agreement import check_agreement
from fastguard.ranks.groups import Group, refuse_several_ranks
from fastguard.records.device_row import Outcome, learning_rate
from fastguard.records.losses import Loss, ObservedLosses, named_losses, stacked
from fastguard.records.recorder import Recorder
from fastguard.stages.contract import GuardState, NonFinite, Policy, Signals, Verdict
from fastguard.stages.decide import decide, raise_if_nonfinite
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure, norm_type_of
from fastguard.stages.reduce import reduce
from fastguard.stages.spike_rules import GRAD_NORM, MissingLosses, Rule, rules_by_signal

if TYPE_CHECKING:
    from fastguard.guard.rank_watch import RankWatch

log: logging.Logger = logging.getLogger("fastguard")

NOT_GIVEN: Any = object()
"""Instead of a closure: a None that is given reaches the wrapped step, which may require it."""


class GuardedOptimizer(KnownRun):
    """Wraps an optimizer so that no bad step reaches the weights.

    Args:
        optimizer: Any dense optimizer of `torch.optim`, or one that behaves like them. Fused ones
            skip on the device without a synchronisation.
        max_norm: Limit of the gradient norm, >= 0; None or `inf`: measure only. Or a rule that sets
            it at each step: `ZClip`, `AutoClip`, `AdaGC`, or an `AdaptiveLimit` of your own. Or
            `AGC`, with `clip_scope="unit"`.
        norm_type: p > 0 of the p-norm, `inf` for the largest magnitude.
        clip_scope: What one clip coefficient is for: the whole model (`"global"`), each param group
            (`"group"`, which may carry a `max_norm` of its own), each tensor (`"tensor"`), or each
            row or filter of a layer (`"unit"`, see `AGC`). A param group may also carry
            `clip_value`: its finite elements are clamped before the norm.
        nonfinite: What NaN and Inf in gradients do: `"skip"` the step, set them to `"zero"`,
            `"raise"` before anything is changed, or `"propagate"` as torch does. A non-finite loss
            skips the step in the first two modes, raises in the third, and is ignored in the last.
        spike: A `SpikeRule` or `Threshold` for the gradient norm, or a dict of them by signal
            (`"grad_norm"` or the name of a loss).
        max_consecutive_skips: More skips in a row than this raise `TrainingDivergedError`. Skips
            that only lower a loss scale are not counted here.
        named_parameters: `model.named_parameters()`, so that records can name the culprit.
        flat_buckets: Keep the gradients in one buffer per (device, dtype): see `FlatGradBuckets`.
        flat_parameters: Keep parameters and optimizer state in such buffers too, so that a step
            over thousands of tensors costs what one long tensor costs. For `AdamW`, `Adam`, `SGD`
            and `Adagrad` of `torch.optim`, with torch's fused kernels; implies `flat_buckets`.
        compile_step: Compile the update of the wrapped optimizer with `torch.compile`, every write
            masked by the verdict, so that any optimizer that can be traced skips on the device
            without a synchronisation. `.grad` is then scaled only where the update reads it.
        group: Who decides together. None: this process; with DTensors, the ranks that their meshes
            span. A process group: its ranks, which hold different tensors (pipeline stages,
            experts). `fastguard.Replicated(process_group)`: its ranks, which hold the same tensors
            (DDP). Every rank must construct the guard and take every step.
        watch: What else to read, for `StepRecord.watch`: `"tensor_norms"`, `"update_ratio"`,
            `"noise_scale"`, `"replica_drift"`, `"underflow"`. docs/watch.md says what each costs.
        watch_every: Steps from one watched step to the next, from 1; the first step is watched.

    Attributes:
        optimizer: The wrapped optimizer.
        last: The `Verdict` of the last step, device tensors that nothing has waited for:
            `total_norm`, `clip_coef`, `found_inf`, and others. None before the first step.

    Raises:
        TypeError, ValueError: An argument is not of the kind or range above; nothing was changed.

    Example:
        >>> import torch, fastguard
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fastguard.GuardedOptimizer(
        ...     torch.optim.AdamW(model.parameters(), fused=True),
        ...     max_norm=1.0,
        ...     named_parameters=model.named_parameters(),
        ... )
        >>> model.weight.grad = torch.tensor([[float("nan"), 1.0]])
        >>> opt.step()
        >>> opt.skipped_steps, opt.records()[0].culprits
        (1, (('weight', 1, 0, 0),))
    """

    _step_supports_amp_scaling = True  # GradScaler.step then always calls step, also on Inf
    rank_watch: RankWatch | None = None
    _agreed = False  # that all ranks were given the same arguments; asked once
    _may_have_losses = False  # which ranks that decide alone must not; asked once

    @keywords_only
    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_norm: Limit | None = None,
        norm_type: float = 2.0,
        clip_scope: ClipScope = "global",
        nonfinite: NonFinite = "skip",
        spike: Rule | Mapping[str, Rule] | None = None,
        max_consecutive_skips: int | None = None,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        flat_buckets: bool = False,
        flat_parameters: bool = False,
        compile_step: bool = False,
        group: Group = None,
        watch: Iterable[WatchName] = (),
        watch_every: int = WATCH_EVERY,
    ) -> None:
        check_optimizer(optimizer, group)
        check_choice("clip_scope", clip_scope, SCOPES)
        check_choice("nonfinite", nonfinite, MODES)
        check_budget(max_consecutive_skips)
        self.norm_type: float = norm_type_of(norm_type)
        self.max_norm: Limit | None = None if max_norm is None else checked_limit(max_norm)
        rules = rules_by_signal(spike)
        limits(optimizer.param_groups, clip_scope, self.max_norm)
        names = names_by_tensor(named_parameters, optimizer.param_groups)
        if flat_parameters:
            check_flat_optimizer(optimizer)
        if compile_step:
            check_compiled_optimizer(optimizer, flat_parameters)

        self.optimizer = optimizer
        self.clip_scope: ClipScope = clip_scope
        self.nonfinite: NonFinite = nonfinite
        self.rules: Mapping[str, Rule] = rules
        self.max_consecutive_skips = max_consecutive_skips
        self.group = group
        self._gradients = Gradients(
            optimizer, clip_scope, names, self.norm_type, flat_buckets, group, flat_parameters
        )
        self._watch = watch_of(watch, watch_every, self._gradients.team, self.norm_type)
        check_road(self.watch, WholeStep.serves(optimizer), optimizer)
        self._device = self._gradients.device
        self._recorder = Recorder()
        self._stepper = stepper_asked_for(optimizer, self._gradients, flat_parameters, compile_step)
        self._limits: tuple[Limit, ...] = ()
        self._policy = self._current_policy()
        self._state = GuardState.fresh(self._policy, self._device)
        if self._gradients.team is not None:  # so that ranks without a loss know what rules judge
            self._gradients.team.loss_names.reserve([s for s in rules if s != GRAD_NORM])
        self._missing_losses = None if self._gradients.team else MissingLosses.of(rules)
        self._observed = ObservedLosses()
        self._signature = StepSignature.of(optimizer)
        self.last: Verdict | None = None
        self._steps_taken = 0
        self._become_an_optimizer()
        announce_guard(self)

    @with_own_hooks
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Loss] | None = NOT_GIVEN,
        /,
        *args: Any,
        loss: Loss | None = None,
        tag: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Measures the gradients, decides, and lets the wrapped optimizer step, or not.

        An exception takes the step back, unless the wrapped optimizer has stepped already: either
        it counts in full (counters, baselines, records), or not at all.

        Args:
            closure: Evaluates the model once more and returns the loss, as in torch.
            args, kwargs: What else the wrapped optimizer's `step` takes.
            loss: The loss of this step, a scalar or a dict of scalars by name; a non-finite one
                makes the step bad, and spike rules judge it by name (`"loss"` if it has none).
            tag: Anything that helps to find the batch again; it comes back in the record.

        Returns:
            What the wrapped optimizer's `step` returned; where that is None, what `closure` did.

        Raises:
            NonFiniteGradError: `nonfinite="raise"` and something is non-finite.
            TrainingDivergedError: More than `max_consecutive_skips` incidents in a row were
                skipped; on a road without synchronisation this comes one step later.
        """
        if torch_dcp.only_creates_state(self.optimizer):
            return self.optimizer.step()
        given = () if closure is NOT_GIVEN else (closure, *args)
        call = self._signature.call(given, kwargs, loss=loss, tag=tag)
        try:
            return self._take(call, loss, tag)
        except ClosureNeeded:
            check_whole_step(self.optimizer, self.group)
            check_road(self.watch, True, self.optimizer)
            self._conclude()
            self._observed.keep()
            self._stepper, self._limits = WholeStep(self.optimizer), ()
            log.info("%s", self.describe())
            with without_pre_hooks_of_all(self.optimizer):  # the first try has run them
                return self._take(call, loss, tag)

    def _take(self, call: StepCall, loss: Loss | None, tag: Any) -> Any:
        """One step, which `_after_failure` ends if an exception leaves it."""
        self._conclude()  # one whose end was interrupted again and again
        self._deliver(before=True)
        flight = self._flight = StepInFlight(self._steps_taken + 1, call, self._observed)
        stop = self.nonfinite != "propagate"
        result, loss = self._stepper.evaluate(call, loss, stop_at_nonfinite=stop)
        self.observe(loss)
        self._guarded_step(flight, call, tag)
        self._conclude()
        self._deliver(before=False)
        returned = call.returned[-1] if call.returned else None
        return result if returned is None else returned

    @torch.no_grad()
    def _guarded_step(self, flight: StepInFlight, call: StepCall, tag: Any) -> None:
        self._follow_parameters()
        handed = handed_over(self, self._device)
        signals, policy = self._signals(handed), self._current_policy()
        self._agree()
        buckets = self._gradients.buckets()
        flight.clamped = Clamped.of(
            self.param_groups, signals.inv_scale, keep=policy.nonfinite == "raise"
        )

        watched, signals = read_step(self._watch, self, buckets, signals, handed.scaler)
        stats = measure(buckets, self.norm_type, signals.inv_scale)
        stats, signals = self._reduced(stats, signals, buckets, handed)
        if watched is not None:
            watched.take_sums(signals)
        if policy.nonfinite == "raise":
            raise_if_nonfinite(stats, signals)
        lr = learning_rate(self.param_groups, self._device)
        flight.keep(self._state)
        verdict = decide(stats, signals, self._state, policy)
        if self._units is not None:
            propagates = policy.nonfinite == "propagate"
            layout = self._gradients.layout
            verdict = self._units.clip(layout, verdict, signals, self.norm_type, propagates)
        flight.outcome = Outcome(
            stats,
            signals,
            verdict,
            self._state,
            policy.signals,
            lr,
            tag,
            policy.joint_limit,
            watched,
        )
        self._stepper.step(buckets, verdict, call, policy.may_change(signals))
        flight.obeyed = True
        if watched is not None:
            watched.after_update()

    def _reduced(
        self, stats: GradStats, signals: Signals, buckets: GradBuckets, handed: HandedOver
    ) -> tuple[GradStats, Signals]:
        """What all ranks measured and know; also the scaler of this one is told."""
        if self.rank_watch is not None:
            stats, signals = self.rank_watch.told(stats, signals)
        stats, signals = reduce(stats, signals, buckets.sharing, losses=True)
        if handed.scaler is not None and buckets.sharing is not None:
            tell_scaler(handed.scaler, self, signals.found_inf)
        return stats, signals

    def observe(self, loss: Loss | None) -> None:
        """Gives the guard a loss ahead of `step`, for trainers that call `step()` themselves.

        Several calls before one step (gradient accumulation) count together: any non-finite one
        makes the step bad, spike rules judge the mean.

        Args:
            loss: As in `step`.
        """
        if loss is None:
            return
        losses = named_losses(loss, read=True)
        if losses and not self._may_have_losses:
            if self.group is None and self._gradients.team is None:
                refuse_several_ranks()
            self._may_have_losses = True
        self._observed.observe(losses)

    def _follow_parameters(self) -> None:
        """Other parameters or settings may take another road; on another device, the guard goes
        with them.
        """
        if self._gradients.refresh():
            self._stepper.reset()
            self._limits = ()  # there may be more or fewer segments
        self._fitting_stepper()
        device = self._gradients.device
        if device != self._device:
            self._limits = ()  # of a policy that lies on the old one
            self._state, self._device = self._state.to(device), device

    def _agree(self) -> None:
        """Once: that all ranks were given the same arguments."""
        team = self._gradients.team
        if self._agreed or watched():  # under a tracer there are no numbers to compare
            return
        if team is not None:
            check_agreement(arguments_of(self, team), places_of(self, team), team)
        self._agreed = True

    def _signals(self, handed: HandedOver) -> Signals:
        losses = self._observed.take()
        if self._missing_losses is not None:
            self._missing_losses = self._missing_losses.after(losses)
        if handed.scaler is not None:
            self._recorder.longest_search = longest_search(handed.scaler)
        return handed.signals(stacked(losses, self._device), tuple(losses))

    def _current_policy(self) -> Policy:
        """The policy with the limits that the param groups hold now."""
        now = limits(self.param_groups, self.clip_scope, self.max_norm)
        if now != self._limits:
            if 0.0 in now:
                warn_of_zero("max_norm")
            limited, rules = self._stepper.obeyed(now, tuple(self.rules.values()))
            n_segments = self._gradients.layout.n_segments
            policy = policy_of(
                limited,
                self.clip_scope,
                self.norm_type,
                n_segments,
                self._device,
                self.nonfinite,
                dict(zip(self.rules, rules, strict=True)),
            )
            fixed = policy.joint_limit
            self._recorder.max_norm = math.inf if isinstance(fixed, Tensor) else fixed
            if hasattr(self, "_policy"):  # not while it is constructed
                guard_state.fit(self._state, self._policy, policy, self._device)
            layout = self._gradients.layout
            self._units = None if policy.agc is None else UnitClipping(policy.agc, layout)
            self._policy, self._limits = policy, now
        return self._policy

    # Being an optimizer.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group to the wrapped optimizer; it is guarded from the next step on.

        Raises:
            TypeError, ValueError: It cannot be guarded; it was not added.
        """
        named = named_parameters_of(param_group)
        limits([*self.param_groups, param_group], self.clip_scope, self.max_norm)
        check_settings(param_group, [p for _, p in named])
        self._gradients.check_new(named)
        if self._gradients.with_parameters:
            check_flat_dtypes(self.optimizer, [p for _, p in named])
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; with flat buckets by one fill, so they stay attached."""
        self._gradients.zero_(set_to_none)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's state dict, and the guard's state under `"fastguard"`.

        For `torch.distributed.checkpoint` that state is in the first param group as well.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        guard = guard_state.save(self._state, self._policy, self._taken_back)
        state_dict = parts.joined(self.optimizer.state_dict(), guard)
        if torch_dcp.is_calling():
            torch_dcp.embed(state_dict, self.optimizer)
        for hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes exactly: optimizer, counters and spike baselines; see `lifetime`.

        A state dict without `"fastguard"` loads into a fresh guard, with one warning.

        Raises:
            TypeError, ValueError: It belongs to another configuration; nothing was changed.
        """
        state_dict = parts.opened(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        wrapped, saved = parts.parts(state_dict, self.optimizer)
        guard = guard_state.load(saved, self._policy, self._device)
        taken_back = saved_with(saved)
        inner_state.load(self.optimizer, wrapped, self._check_param_groups)
        self._fitting_stepper().reset()
        self._observed = ObservedLosses()
        self._go_on_from(guard, taken_back)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_param_groups(self) -> None:
        limits(self.param_groups, self.clip_scope, self.max_norm)
        for group in self.param_groups:
            check_settings(group, group["params"])
