"""Calling the `step` of the wrapped optimizer: its arguments and its closure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.guard.found_inf import knows_found_inf
from fastguard.guard.optimizer_copy import OptimizerCopy
from fastguard.guard.step_hooks import has_post_hooks, told_of_the_step

CLOSURES = ("closure", "fn", "func")
"""What the names of parameters contain that take a function."""


@dataclass(slots=True)
class StepCall:
    """One call of `GuardedOptimizer.step`, as far as it concerns the wrapped optimizer.

    Attributes:
        closure: Evaluates the model and returns the loss; None: there is none.
        args, kwargs: All other arguments for the wrapped optimizer.
        place: The position or the name under which the wrapped `step` takes the closure; None: it
            takes none, and the guard alone evaluates it.
        result: What the closure has returned.
        returned: What the wrapped `step` returned, noted in the same line: no interrupt comes
            between. Before its post-hooks run, None.
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
        """The arguments for the wrapped `step`, a closure among them."""
        args, place = self.args, self.place
        if isinstance(place, int):
            return (*args[:place], closure, *args[place + 1 :]), dict(self.kwargs)
        return args, {**self.kwargs, str(place): closure}


class StepSignature(NamedTuple):
    """What the `step` of an optimizer takes.

    Attributes:
        closure: The name of the parameter for the closure; None: no name tells which it is.
        place: The position of that parameter; None: it goes by name.
        takes_any: Nothing is known of the positional parameters (`*args`): the first one is the
            closure if it can be called.
        n_other: How many positional parameters it has besides.
        shared: Those of the guard's own keyword arguments that it takes too.
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
        except (TypeError, ValueError):  # some callables of C have none
            return StepSignature()
        # A scheduler puts a function on the instance that looks like the unbound method.
        parameters = [p for p in parameters if p.name != "self"]
        kinds = {p.kind for p in parameters}
        variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        named = [p.name for p in parameters if p.kind not in variable]
        positional = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        takes_any = not positional and inspect.Parameter.VAR_POSITIONAL in kinds
        closure = next(filter(_is_closure, named), None)
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
            args, kwargs: Those for the wrapped `step`, the closure among them.
            own: The guard's own keyword arguments.

        Raises:
            TypeError: The closure cannot be called.
        """
        for name in self.shared:
            if own[name] is not None:
                kwargs[name] = own[name]
        if not args and not kwargs:
            return StepCall()
        for name in {"closure", self.closure}.intersection(kwargs):
            return self._with_named(args, dict(kwargs), str(name))
        place = self.place
        if self.closure is None:
            found = _evaluation_among(args, kwargs)
            if found is not None:
                return found
            if not self.n_other:
                place = 0  # what the guard alone evaluates
        if place is None or place >= len(args):
            return StepCall(None, args, kwargs)
        closure, rest = args[place], args[place + 1 :]
        if closure is None:  # passed on: the wrapped step may require the argument
            return StepCall(None, args if self.place is not None else (), kwargs)
        if self.takes_any and not callable(closure):
            return StepCall(None, args, kwargs)
        args = (*args[:place], None, *rest) if rest else args[:place]
        return StepCall(checked_closure(closure), args, kwargs, self.place)

    def _with_named(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> StepCall:
        """A call whose closure was given by name; the wrapped `step` may have another name for it,
        or none.
        """
        closure = checked_closure(kwargs.pop(name))
        if self.closure is None:
            return StepCall(closure, args, kwargs)
        place = self.place if self.place is not None and self.place <= len(args) else self.closure
        call = StepCall(closure, args, kwargs, place)
        if closure is None:  # passed on: the wrapped step may require the argument
            call.args, call.kwargs = call.with_closure(None)
        return call


def _evaluation_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall | None:
    """The call with what evaluates the model as its closure, where no name says which argument that
    is; None: no argument does.
    """
    for place, value in [*enumerate(args), *kwargs.items()]:
        if _evaluates(value):
            others = {name: other for name, other in kwargs.items() if name != place}
            return StepCall(value, args, others, place)
    return None


def _evaluates(value: Any) -> bool:
    """Whether a value is a function without arguments; modules and classes are not meant."""
    if not callable(value) or isinstance(value, type | torch.nn.Module | Tensor):
        return False
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):  # it needs arguments, or does not tell
        return False
    return True


class ClosureNeeded(Exception):
    """An optimizer evaluates its closure itself; its step has been put back."""


class _EvaluatedElsewhere(Exception):
    """Leaves the optimizer's step: the closure is called again, or behind a move of the weights."""


class InnerStep:
    """Calls the `step` of an optimizer.

    The closure has been evaluated then, and the gradients may have been clipped. Optimizers that
    evaluate it first of all, as nearly all do, get one that returns the known loss. Whether an
    optimizer is one of them shows at its first step with a closure, of which a copy is made.

    Args:
        optimizer: The wrapped one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._evaluates_first = steps_as_torch(optimizer)
        self._before: OptimizerCopy | None = None

    def evaluate(self, call: StepCall) -> Any:
        """What the closure returns; None without one."""
        if call.closure is None:
            return None
        if call.place is not None and not self._evaluates_first:
            with suppress(Exception):  # a state may hold what cannot be copied
                self._before = OptimizerCopy.of(self.optimizer, gradients=True)
        with torch.enable_grad():
            call.result = call.closure()
        return call.result

    def __call__(self, call: StepCall) -> None:
        """Steps; notes what `step` returned.

        Raises:
            ClosureNeeded: The optimizer evaluates its closure elsewhere too.
            TypeError: It does so after steps in which it did not, or its state cannot be copied.
        """
        if call.closure is None or call.place is None:
            self._step(call, call.args, call.kwargs)
            return
        known = self._known(call.result)
        try:
            self._step(call, *call.with_closure(known))
        except _EvaluatedElsewhere:
            if self._before is None:
                raise TypeError(
                    f"{type(self.optimizer).__name__}.step evaluates its closure behind a move of "
                    "the weights, which has no copy to be put back from; fastguard cannot guard it"
                ) from None
            self._before.restore()
            raise ClosureNeeded from None
        self._evaluates_first, self._before = True, None

    def _step(self, call: StepCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        optimizer = self.optimizer
        if not has_post_hooks(optimizer):
            call.returned.append(optimizer.step(*args, **kwargs))
            return
        with told_of_the_step(optimizer, call.returned):
            call.returned.append(optimizer.step(*args, **kwargs))

    def _known(self, loss: Any) -> Callable[[], Any]:
        """A closure that returns the known loss where an evaluation would give the same."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self._evaluates_first:  # a look at one tells enough, and costs nothing
            parameters = parameters[:1]
        before: list[tuple[int, ...]] | None = _versions(parameters)

        def known() -> Any:
            nonlocal before
            if _versions(parameters) != before:
                raise _EvaluatedElsewhere
            before = None  # not a second time
            return loss

        return known


def steps_as_torch(optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer is one of torch's, which evaluate their closure first."""
    module = getattr(inspect.unwrap(type(optimizer).step), "__module__", "")
    return f"{module}.".startswith("torch.optim.")


def _versions(parameters: list[Tensor]) -> list[tuple[int, ...]]:
    """What tells whether parameters and their gradients are still the same."""
    return [
        (p._version, -1 if p.grad is None else id(p.grad), 0 if p.grad is None else p.grad._version)
        for p in parameters
    ]


def found_inf_is_heeded(optimizer: Optimizer) -> bool:
    """Whether the kernels of an optimizer read `found_inf`, in every param group as it is now.

    The groups can change at any time, by hand or with a state dict. With `foreach` beside `fused`
    the SGD of torch takes the former, and refuses `found_inf`.
    """
    return knows_found_inf(optimizer) and all(
        group.get("fused") and not group.get("foreach") for group in optimizer.param_groups
    )


def checked_closure(closure: object) -> Any:
    """The closure of a step.

    Raises:
        TypeError: It cannot be called: most likely it is the loss.
    """
    if closure is not None and not callable(closure):
        raise TypeError(
            f"the closure is a {type(closure).__name__}, which cannot be called; if it is the loss "
            "of this step, pass opt.step(loss=loss)"
        )
    return closure


def _is_closure(name: str) -> bool:
    return any(part in name for part in CLOSURES)
