"""Calls the `step` of the wrapped optimizer: sorts its arguments, and evaluates its closure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.guard.optimizer_copy import OptimizerCopy
from fastguard.guard.own_backward import OwnBackward, TakenStep
from fastguard.guard.step_hooks import has_post_hooks, is_hooked, noting_completion

CLOSURES = ("closure", "fn", "func")
"""Parts of parameter names that denote a closure, the surest first. A value of the others may also
be a function that needs arguments, such as `loss_fn`, which is not a closure."""


PROVEN_AFTER = 10
"""Steps with a closure after which an optimizer is taken to evaluate it once and before it changes
anything. Until then each step copies weights and state: some optimizers take steps of two kinds."""


@dataclass(slots=True)
class StepCall:
    """The arguments and results of one call of the wrapped optimizer's `step`.

    Attributes:
        closure: Evaluates the model and returns the loss; None: there is none.
        args, kwargs: All other arguments for the wrapped optimizer.
        place: The position or name of the closure in the wrapped `step`; None: it takes no
            closure, so only the guard evaluates it.
        result: The result of the closure.
        returned: A list to which the result of the wrapped `step` is appended, in the same line as
            the call, so that no interrupt can come in between. If there are post-hooks, None is
            appended before they run. A list that is not empty means that the weights have changed.
    """

    closure: Callable[[], Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    place: int | str | None = None
    result: Any = None
    returned: list[Any] = field(default_factory=list)

    def with_closure(
        self, closure: Callable[[], Any] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments for the wrapped `step` including a closure."""
        args, place = self.args, self.place
        if isinstance(place, int):
            return (*args[:place], closure, *args[place + 1 :]), dict(self.kwargs)
        return args, {**self.kwargs, str(place): closure}


class StepSignature(NamedTuple):
    """The parameters of an optimizer's `step`.

    Attributes:
        closure: The name of the closure parameter; None: the names do not tell.
        place: The position of the closure parameter; None: keyword only.
        takes_any: Whether it has only `*args` as positional parameters; then the first argument is
            the closure if it is callable.
        n_other: Number of other positional parameters.
        shared: Keyword arguments of the guard that the wrapped `step` also takes.
    """

    closure: str | None = "closure"
    place: int | None = 0
    takes_any: bool = False
    n_other: int = 0
    shared: frozenset[str] = frozenset()

    @staticmethod
    def of(optimizer: Optimizer) -> StepSignature:
        """Reads the signature of an optimizer's `step`."""
        try:
            parameters = inspect.signature(optimizer.step).parameters.values()
        except (TypeError, ValueError):  # some C functions have no signature
            return StepSignature()
        # A scheduler sets a function on the instance that has the signature of the unbound method.
        parameters = [p for p in parameters if p.name != "self"]
        kinds = {p.kind for p in parameters}
        variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        named = [p.name for p in parameters if p.kind not in variable]
        positional = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        takes_any = not positional and inspect.Parameter.VAR_POSITIONAL in kinds
        closure = next((name for part in CLOSURES for name in named if part in name), None)
        if closure is None and (takes_any or inspect.Parameter.VAR_KEYWORD in kinds):
            closure = "closure"
        place = positional.index(closure) if closure in positional else None
        return StepSignature(
            closure,
            0 if takes_any and closure not in named else place,
            takes_any,
            len(positional) - (place is not None),
            frozenset({"loss", "tag"}.intersection(named)),
        )

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], **own: Any) -> StepCall:
        """Sorts the arguments of `GuardedOptimizer.step`.

        Args:
            args, kwargs: The arguments for the wrapped `step`, including the closure.
            own: The keyword arguments of the guard.

        Raises:
            TypeError: The closure cannot be called.
        """
        for name in self.shared:
            if own[name] is not None:
                kwargs[name] = own[name]
        if not args and not kwargs:
            return StepCall()
        for name in {"closure", self.closure}.intersection(kwargs):
            if not self._may_be_closure(kwargs[name]):
                return StepCall(None, args, kwargs)
            return self._with_named(args, dict(kwargs), str(name))
        place = self.place
        if self.closure is None:
            found = _call_with_found_closure(args, kwargs)
            if found is not None:
                return found
            if not self.n_other:
                place = 0  # a closure that only the guard evaluates
        if place is None or place >= len(args):
            return StepCall(None, args, kwargs)
        closure, rest = args[place], args[place + 1 :]
        if closure is None:  # passed on: the wrapped step may require the argument
            return StepCall(None, args if self.place is not None else (), kwargs)
        if (self.takes_any and not callable(closure)) or not self._may_be_closure(closure):
            return StepCall(None, args, kwargs)
        args = (*args[:place], None, *rest) if rest else args[:place]
        return StepCall(checked_closure(closure), args, kwargs, self.place)

    def _may_be_closure(self, value: Any) -> bool:
        """Whether a value of the closure parameter is not clearly a function of another kind."""
        is_sure = self.closure is None or "closure" in self.closure
        return is_sure or not callable(value) or _can_be_closure(value)

    def _with_named(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> StepCall:
        """Returns the call for a closure passed by keyword, whose name in `step` may differ."""
        closure = checked_closure(kwargs.pop(name))
        if self.closure is None:
            return StepCall(closure, args, kwargs)
        place = self.place if self.place is not None and self.place <= len(args) else self.closure
        call = StepCall(closure, args, kwargs, place)
        if closure is None:  # passed on: the wrapped step may require the argument
            call.args, call.kwargs = call.with_closure(None)
        return call


def _call_with_found_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall | None:
    """Returns the call with the first argument that is a function without parameters as closure.

    For a `step` whose parameter names do not show which one is the closure. Returns None if no
    argument is such a function.
    """
    for place, value in [*enumerate(args), *kwargs.items()]:
        if _can_be_closure(value):
            others = {name: other for name, other in kwargs.items() if name != place}
            return StepCall(value, args, others, place)
    return None


def _can_be_closure(value: Any) -> bool:
    """Whether a value is a function without required arguments; not a module or class."""
    if not callable(value) or isinstance(value, type | torch.nn.Module | Tensor):
        return False
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):  # the function needs arguments, or has no signature
        return False
    return True


class ClosureNeeded(Exception):
    """The optimizer evaluates the model itself.

    Args:
        taken: The step, if it has been taken; None: it has been undone.
    """

    def __init__(self, taken: TakenStep | None = None) -> None:
        super().__init__()
        self.taken = taken

    def undo(self) -> None:
        """Undoes a step that has been taken."""
        if self.taken is not None:
            self.taken.before.restore()


class _EvaluatedElsewhere(Exception):
    """Raised from a closure that is called again, with arguments, or with changed weights."""


class InnerStep:
    """Calls the `step` of an optimizer, after the guard has evaluated the closure.

    Nearly all optimizers evaluate their closure once, before they change anything; they get a
    closure that returns the known loss. The others are detected in one of their first steps with a
    closure, which is undone from a copy. Optimizers that compute gradients without a closure are
    detected in their first step.

    Args:
        optimizer: The wrapped optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._is_torchs = steps_as_torch(optimizer)
        self._n_unproven = 0 if self._is_torchs else PROVEN_AFTER
        self._may_call_backward = not self._is_torchs
        self._before: OptimizerCopy | None = None
        self._with_grad = True  # whether the caller of `step` has gradients enabled

    def evaluate(self, call: StepCall) -> Any:
        """Evaluates the closure and returns its result; None without a closure."""
        self._with_grad = torch.is_grad_enabled()
        if call.closure is None:
            return None
        if call.place is not None and self._n_unproven:
            with suppress(Exception):  # copying fails for some objects in the state
                self._before = OptimizerCopy.of(self.optimizer, gradients=True)
        with torch.enable_grad():
            call.result = call.closure()
        return call.result

    def __call__(self, call: StepCall) -> None:
        """Calls `step` and stores its result.

        Raises:
            ClosureNeeded: The optimizer evaluates its closure again, with arguments, or with other
                weights; or it computes gradients without a closure.
            TypeError: The optimizer evaluates its closure again, but the step cannot be undone,
                because no copy was made: an earlier step did not need one, or the state cannot be
                copied.
        """
        if call.closure is None or call.place is None:
            if self._may_call_backward:
                self._observed_step(call)
            else:
                self._step(call, call.args, call.kwargs)
            return
        evaluated = False

        def noted(*args: Any, **kwargs: Any) -> Any:
            nonlocal evaluated
            evaluated = True
            return known(*args, **kwargs)

        known = self._known(call.result)
        try:
            self._step(call, *call.with_closure(noted))
        except _EvaluatedElsewhere:
            if self._before is None:
                raise self._refusal("evaluates its closure") from None
            self._before.restore()
            raise ClosureNeeded from None
        # Some optimizers evaluate it only in some steps, so steps without it prove nothing.
        self._n_unproven -= evaluated and self._n_unproven > 0
        self._before = None

    def _observed_step(self, call: StepCall) -> None:
        """Calls `step` for the first time, and checks whether it computes gradients itself."""
        with OwnBackward(self.optimizer) as own:
            self._step(call, call.args, call.kwargs)
        if not own.found:
            self._may_call_backward = False
            return
        if own.before is None:
            call.returned.clear()  # not counted, since the guard has not seen its gradients
            raise self._refusal("computes gradients")
        taken = TakenStep(own.before, call, call.returned[-1])
        call.returned.clear()
        raise ClosureNeeded(taken)

    def _refusal(self, what: str) -> TypeError:
        return TypeError(
            f"{type(self.optimizer).__name__}.step {what} after changing the weights, which "
            "cannot be undone without a copy; use this optimizer without a guard"
        )

    def _step(self, call: StepCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        optimizer = self.optimizer
        # the optimizer's step sets the grad mode itself
        if self._is_torchs and not is_hooked(optimizer):
            call.returned.append(_unprofiled_step(optimizer)(*args, **kwargs))
            return
        with torch.set_grad_enabled(self._with_grad):
            if not has_post_hooks(optimizer):
                call.returned.append(optimizer.step(*args, **kwargs))
                return
            with noting_completion(optimizer, call.returned):
                call.returned.append(optimizer.step(*args, **kwargs))

    def _known(self, loss: Any) -> Callable[[], Any]:
        """Returns a closure that returns the known loss as long as the weights are unchanged.

        With changed weights, the closure raises `_EvaluatedElsewhere`. It also raises this error if
        it is called with arguments, which only the user's closure understands.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        values: list[Tensor] = []
        if not self._n_unproven:  # checking a single parameter is sufficient and costs nothing
            parameters = parameters[:1]
        else:
            with suppress(Exception):  # some tensors cannot be copied
                values = [p.detach().clone() for p in parameters]
        before: list[tuple[int, ...]] | None = _versions(parameters)

        def known(*args: Any, **kwargs: Any) -> Any:
            nonlocal before
            if args or kwargs or _versions(parameters) != before or _differ(parameters, values):
                raise _EvaluatedElsewhere
            before = None  # makes a second call raise
            return loss

        return known


def steps_as_torch(optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer is defined in torch; these evaluate their closure first."""
    module = getattr(inspect.unwrap(type(optimizer).step), "__module__", "")
    return f"{module}.".startswith("torch.optim.")


def _unprofiled_step(optimizer: Optimizer) -> Callable[..., Any]:
    """Returns the `step` of an optimizer without hooks, also without torch's unused profiler range.

    The range takes 20 µs. A `step` that other code has replaced is returned as it is.
    """
    step: Any = type(optimizer).step
    if (
        "step" in vars(optimizer)
        or getattr(step, "__code__", None) is not _PROFILED
        or torch.autograd._profiler_enabled()
    ):
        return optimizer.step
    return step.__wrapped__.__get__(optimizer)


_PROFILED = getattr(Optimizer.profile_hook_step(lambda self: None), "__code__", None)
"""The code of the function in which torch wraps the `step` of each class of optimizers."""


def _versions(parameters: list[Tensor]) -> list[tuple[int, ...]]:
    """Returns version counters that change when parameters or their gradients do."""
    return [
        (p._version, -1 if p.grad is None else id(p.grad), 0 if p.grad is None else p.grad._version)
        for p in parameters
    ]


def _differ(parameters: list[Tensor], values: list[Tensor]) -> bool:
    """Whether weights differ from earlier values.

    Versions do not tell, since changes of `p.data` increment none.
    """
    with suppress(Exception):  # placeholders and some subclasses cannot be compared
        return not all(map(_equal, parameters, values))
    return False


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all elements are equal; NaN counts as equal to NaN."""
    if torch.equal(a, b):
        return True
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def checked_closure(closure: object) -> Any:
    """Returns the closure of a step.

    Raises:
        TypeError: The closure is not callable, so it is probably the loss.
    """
    if closure is not None and not callable(closure):
        raise TypeError(
            f"the closure is a {type(closure).__name__}, but must be callable; if it is the loss "
            "of this step, pass opt.step(loss=loss)"
        )
    return closure
