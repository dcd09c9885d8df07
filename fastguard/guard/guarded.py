"""`GuardedOptimizer`: wraps an optimizer, and applies, clips, cleans or skips each of its steps.

A step runs four stages (measure, reduce, decide, apply), then the wrapped optimizer, see
`_guarded_step`. The rest of this module collects inputs (losses, scaler), writes records, and
implements the interface of `torch.optim.Optimizer` for schedulers, scalers and trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from fastguard.errors.logger import log
from fastguard.functional.arguments import warn_of_zero
from fastguard.gradients import tensor_kinds
from fastguard.gradients.buckets import GradBuckets
from fastguard.guard.announcement import announce_guard
from fastguard.guard.arguments import (
    MODES,
    check_budget,
    check_choice,
    check_flat_choice,
    check_optimizer,
    check_whole_step,
    keywords_only,
    names_by_tensor,
)
from fastguard.guard.clamp import Clamped
from fastguard.guard.clip_scope import (
    SCOPES,
    ClipScope,
    Limit,
    checked_limit,
    limits,
    policy_of,
)
from fastguard.guard.compiled_state import check_compiled_optimizer
from fastguard.guard.flat_checks import check_flat_optimizer
from fastguard.guard.grad_scaler import ScalerInputs, longest_search, scaler_inputs, tell_scaler
from fastguard.guard.inner_step import ClosureNeeded, StepCall, StepSignature
from fastguard.guard.param_gradients import Flat, Gradients
from fastguard.guard.rank_arguments import agree
from fastguard.guard.saving import SavableOptimizer
from fastguard.guard.state_dict import guard_state, torch_dcp
from fastguard.guard.step_hooks import with_own_hooks, without_global_pre_hooks, without_grad
from fastguard.guard.step_in_flight import StepInFlight
from fastguard.guard.stepper import requested_stepper
from fastguard.guard.unit_clipping import UnitClipping
from fastguard.guard.watch.watch import WatchName, check_watchable, read_step, watch_of
from fastguard.guard.whole_step import WholeStep
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

NOT_GIVEN: Any = object()
"""Default for the closure; an explicit None is passed to the wrapped `step`."""


class GuardedOptimizer(SavableOptimizer):
    """Wraps an optimizer so that bad steps never reach the weights.

    Args:
        optimizer: Any dense optimizer of `torch.optim`, or one with the same interface. Fused
            optimizers skip on the device, without synchronization.
        max_norm: Limit of the gradient norm, >= 0; None or `inf`: measure only. Or a rule that sets
            the limit in each step: `ZClip`, `AutoClip`, `AdaGC`, or your own `AdaptiveLimit`. Or
            `AGC`, with `clip_scope="unit"`. Default: None.
        norm_type: p > 0 of the p-norm; `inf`: the largest magnitude. Default: 2.
        clip_scope: What one clip coefficient applies to: the whole model (`"global"`), each param
            group (`"group"`; a group may have its own `max_norm`), each tensor (`"tensor"`), or
            each row or filter of a layer (`"unit"`, see `AGC`). A param group may also have a
            `clip_value`, to which its finite elements are clamped before the norm is computed.
            Default: `"global"`.
        nonfinite: How to handle NaN and Inf in gradients: `"skip"` the step; set them to `"zero"`;
            `"raise"` an error before anything is changed; or `"propagate"` them, as torch does. A
            non-finite loss skips the step in the first two modes, raises in the third, and is
            ignored in the last. Default: `"skip"`.
        spike: A `SpikeRule` or `Threshold` for the gradient norm, or a dict of them by signal
            (`"grad_norm"` or the name of a loss). Default: None.
        max_consecutive_skips: With more consecutive skips than this, `step` raises
            `TrainingDivergedError`. Skips that only lower a loss scale do not count. Default: None.
        named_parameters: `model.named_parameters()`, to name parameters in records.
        flat_buckets: Whether to keep the gradients in one buffer per (device, dtype), see
            `FlatGradBuckets`. `"trusted"`: each step checks only a few parameters, in turn. This
            requires that only the guard's `zero_grad` replaces or removes `.grad`, and that no
            parameter is frozen or unfrozen. Default: False.
        flat_parameters: Whether to keep parameters and optimizer state in such buffers too; a step
            over thousands of tensors is then as fast as over a single one. For `AdamW`, `Adam`,
            `SGD` and `Adagrad` of `torch.optim`, with torch's fused kernels; implies
            `flat_buckets`. `"trusted"`: as above; it also requires that no parameter's `.data` is
            replaced, and that no backward pass runs through a graph built before the last step.
            Default: False.
        compile_step: Whether to compile the update with `torch.compile`, with every write masked by
            the verdict. Any optimizer that can be traced then skips on the device, without
            synchronization. Gradients are scaled within the update; `.grad` is not changed.
            Default: False.
        group: The ranks that decide together. None: this process; with DTensors, the ranks that
            their meshes span. A process group: its ranks, which hold different tensors (pipeline
            stages, experts). `fastguard.Replicated(process_group)`: its ranks, which hold the same
            tensors (DDP). Every rank must construct the guard and take every step.
        watch: Further quantities for `StepRecord.watch`: `"tensor_norms"`, `"update_ratio"`,
            `"noise_scale"`, `"replica_drift"`, `"underflow"`. See docs/watch.md for their cost.
            Default: none.
        watch_every: Interval in steps at which they are read, >= 1; the first step is included.
            Default: None: replica drift in every step, all other quantities every 100 steps.

    Attributes:
        max_norm, nonfinite: The arguments; values assigned later apply from the next step on.
        optimizer: The wrapped optimizer.
        last: The `Verdict` of the last step: device tensors `total_norm`, `clip_coef`, `found_inf`
            and others, computed without waiting. None before the first step.

    Raises:
        TypeError, ValueError: An argument has the wrong type or is out of range, or the optimizer
            cannot be guarded; nothing was changed.

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

    _step_supports_amp_scaling = True  # GradScaler.step then calls step even after an overflow
    rank_watch: RankWatch | None = None
    # number of segments when the arguments of all ranks were last compared; 0: never compared
    _n_agreed = 0
    _may_have_losses = False  # whether losses are known to be allowed without a `group`

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
        flat_buckets: Flat = False,
        flat_parameters: Flat = False,
        compile_step: bool = False,
        group: Group = None,
        watch: Iterable[WatchName] = (),
        watch_every: int | None = None,
    ) -> None:
        check_optimizer(optimizer, group)
        check_choice("clip_scope", clip_scope, SCOPES)
        check_choice("nonfinite", nonfinite, MODES)
        check_budget(max_consecutive_skips)
        check_flat_choice("flat_buckets", flat_buckets)
        check_flat_choice("flat_parameters", flat_parameters)
        self.norm_type: float = norm_type_of(norm_type)
        self.max_norm: Limit | None = None if max_norm is None else checked_limit(max_norm)
        rules = rules_by_signal(spike)
        limits(optimizer.param_groups, clip_scope, self.max_norm)
        names = names_by_tensor(named_parameters, optimizer.param_groups)
        if flat_parameters:
            check_flat_optimizer(optimizer)
        if compile_step:
            check_compiled_optimizer(optimizer, bool(flat_parameters))

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
        check_watchable(self.watch, WholeStep.serves(optimizer), optimizer)
        self._device = self._gradients.device
        self._recorder = Recorder()
        self._stepper = requested_stepper(
            optimizer, self._gradients, bool(flat_parameters), compile_step
        )
        self._limits: tuple[Limit, ...] = ()
        self._policy = self._current_policy()
        self._state = GuardState.fresh(self._policy, self._device)
        # other ranks may pass losses that this rank never gets; they need positions too
        if self._gradients.team is not None:
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
        """Measures the gradients, decides, and calls the `step` of the wrapped optimizer or skips.

        If an exception is raised before the wrapped optimizer has stepped, counters, baselines and
        records are as if the step had not been taken. From then on, the step counts in full.

        Args:
            closure: Evaluates the model again and returns the loss, as in torch.
            args, kwargs: Further arguments for the `step` of the wrapped optimizer.
            loss: The loss of this step, a scalar or a dict of scalars by name. A non-finite loss
                makes the step bad, and spike rules judge losses by name (`"loss"` for a scalar).
            tag: Any value that identifies the batch; it is stored in the record.

        Returns:
            The result of the wrapped optimizer's `step`, or of `closure` if that is None.

        Raises:
            NonFiniteGradError: A gradient or loss is non-finite, and `nonfinite="raise"`.
            TrainingDivergedError: More than `max_consecutive_skips` consecutive incidents were
                skipped. Without synchronization it is raised one step later.
        """
        if torch_dcp.only_creates_state(self.optimizer):
            return self.optimizer.step()
        given = () if closure is NOT_GIVEN else (closure, *args)
        call = self._signature.call(given, kwargs, loss=loss, tag=tag)
        try:
            return self._take(call, loss, tag)
        except ClosureNeeded as needed:
            try:
                check_whole_step(self.optimizer, self.group)
                check_watchable(self.watch, True, self.optimizer)
            except Exception:
                needed.undo()
                raise
            self._conclude()
            self._observed.keep()
            self._stepper, self._limits = WholeStep(self.optimizer, needed.taken), ()
            log.info("%s", self.describe())
            # the global pre-hooks ran in the first attempt
            with without_global_pre_hooks(self.optimizer):
                return self._take(call, loss, tag)

    def _take(self, call: StepCall, loss: Loss | None, tag: Any) -> Any:
        """Takes one step; after an exception, `_after_failure` concludes it."""
        self._conclude()  # an earlier step may have been interrupted before its end
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

    @without_grad
    def _guarded_step(self, flight: StepInFlight, call: StepCall, tag: Any) -> None:
        self._follow_parameters()
        scaling = scaler_inputs(self, self._device)
        signals, policy = self._signals(scaling), self._current_policy()
        agree(self)
        buckets = self._gradients.buckets()
        flight.clamped = Clamped.of(
            self.param_groups, signals.inv_scale, keep=policy.nonfinite == "raise"
        )

        stats = measure(buckets, self.norm_type, signals.inv_scale)
        watched = None
        if self._watch is not None:
            watched, signals = read_step(self._watch, self, buckets, stats, signals, scaling.scaler)
        stats, signals = self._reduced(stats, signals, buckets, scaling)
        if watched is not None:
            watched.take_sums(signals)
        if policy.nonfinite == "raise":
            raise_if_nonfinite(stats, signals)
        lr = learning_rate(self.param_groups, self._device)
        flight.keep(self._state)
        verdict = decide(stats, signals, self._state, policy)
        if self._units is not None:
            propagates = policy.nonfinite == "propagate"
            verdict = self._units.clip(verdict, signals, propagates, self._stepper)
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
            self._gradients.layout.names,
        )
        with nullcontext() if watched is None else watched.during_update():
            self._stepper.step(buckets, verdict, call, policy.may_change(signals))
        flight.obeyed = True
        if watched is not None:
            watched.after_update()

    def _reduced(
        self, stats: GradStats, signals: Signals, buckets: GradBuckets, scaling: ScalerInputs
    ) -> tuple[GradStats, Signals]:
        """Returns stats and signals of all ranks, and passes their `found_inf` to the scaler."""
        if self.rank_watch is not None:
            stats, signals = self.rank_watch.with_origins(stats, signals)
        stats, signals = reduce(stats, signals, buckets.sharing, losses=True)
        if scaling.scaler is not None and buckets.sharing is not None:
            tell_scaler(scaling.scaler, self, signals.found_inf)
        return stats, signals

    def observe(self, loss: Loss | None) -> None:
        """Passes a loss before `step`, for trainers that call `step()` without one.

        Several calls before a step (gradient accumulation) are combined: any non-finite loss makes
        the step bad, and spike rules judge the mean. `zero_grad` discards no loss, because many
        loops call it between the loss and `backward`.

        Args:
            loss: As in `step`; None is ignored.
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
        """Adapts to parameters, settings or devices that changed since the last step."""
        if self._gradients.refresh():
            self._stepper.reset()
            self._limits = ()  # recreates the policy, since the number of segments may differ
        self._fitting_stepper()
        device = self._gradients.device
        if device != self._device:
            self._limits = ()  # recreates the policy on the new device
            self._state, self._device = self._state.to(device), device

    def _signals(self, scaling: ScalerInputs) -> Signals:
        losses = self._observed.take()
        if self._missing_losses is not None:
            self._missing_losses = self._missing_losses.after(losses)
        if scaling.scaler is not None:
            self._recorder.longest_search = longest_search(scaling.scaler)
            self._scaler = ref(scaling.scaler)
        if not losses and scaling.is_empty and not tensor_kinds.watched():  # not while tracing
            return Signals.none(self._device)
        return scaling.signals(stacked(losses, self._device), tuple(losses))

    def _current_policy(self) -> Policy:
        """Returns the policy with the current limits of the param groups and `nonfinite`."""
        now = limits(self.param_groups, self.clip_scope, self.max_norm)
        if now != self._limits or self.nonfinite != self._policy.nonfinite:
            check_choice("nonfinite", self.nonfinite, MODES)
            if 0.0 in now:
                warn_of_zero("max_norm")
            limited, rules = self._stepper.applicable(now, tuple(self.rules.values()))
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
            can_clip = not isinstance(self._stepper, WholeStep)
            self._recorder.limit_is_given = policy.adaptive is None if can_clip else None
            if "_policy" in self.__dict__:  # the attribute is missing while the constructor runs
                guard_state.fit(self._state, self._policy, policy, self._device)
            layout = self._gradients.layout
            agc = policy.agc
            self._units = None if agc is None else UnitClipping(agc, layout, self.norm_type)
            self._policy, self._limits = policy, now
        return self._policy
