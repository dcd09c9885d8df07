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

from fastguard.found_inf import knows_found_inf
from fastguard.optimizer_copy import OptimizerCopy

CLOSURES = ("closure", "fn", "func")
"""What the names of parameters contain that take a function."""


@dataclass(slots=True)
class StepCall:
    """One call of `GuardedOptimizer.step`, as far as it concerns the wrapped optimizer.

    Attributes:
        closure: Evaluates the model and returns the loss; None: there is none.
        args, kwargs: All other arguments for the wrapped optimizer.
        result: What the closure has returned.
        returned: What the wrapped `step` returned, noted in the same line: no interrupt comes
            between.
    """

    closure: Callable[[], Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None
    returned: list[Any] = field(default_factory=list)


class StepSignature(NamedTuple):
    """What the `step` of an optimizer takes.

    Attributes:
        first: The name of its first positional parameter; None: it has none.
        takes_closure: Whether it takes a closure at all.
        shared: Those of the guard's own keyword arguments that it takes too.
    """

    first: str | None = "closure"
    takes_closure: bool = True
    shared: frozenset[str] = frozenset()

    @staticmethod
    def of(optimizer: Optimizer) -> StepSignature:
        try:
            parameters = inspect.signature(optimizer.step).parameters.values()
        except (TypeError, ValueError):  # some callables of C have none
            return StepSignature()
        # A scheduler puts a function on the instance that looks like the unbound method.
        parameters = [p for p in parameters if p.name != "self"]
        positional = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        first = positional[0] if positional else None
        any_first = first is None and any(p.kind is p.VAR_POSITIONAL for p in parameters)
        shared = {"loss", "tag"} & {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        return StepSignature(
            first, any_first or (first is not None and _is_closure(first)), frozenset(shared)
        )

    def call(
        self, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **own: Any
    ) -> StepCall:
        """Sorts the arguments of `GuardedOptimizer.step`.

        Args:
            given: The first positional one: the closure, unless the wrapped `step` begins with
                another parameter.
            args, kwargs: The rest.
            own: The guard's own keyword arguments.

        Raises:
            TypeError: The closure cannot be called.
        """
        for name in self.shared:
            if own[name] is not None:
                kwargs[name] = own[name]
        if given is None and not args:
            return StepCall(None, (), kwargs)
        if given is not None and self.first is not None and not self.takes_closure:
            return StepCall(None, (given, *args), kwargs)
        return StepCall(checked_closure(given), (None, *args) if args else (), kwargs)


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
        self._takes_closure = StepSignature.of(optimizer).takes_closure
        self._evaluates_first = steps_as_torch(optimizer)
        self._before: OptimizerCopy | None = None

    def evaluate(self, call: StepCall) -> Any:
        """What the closure returns; None without one."""
        if call.closure is None:
            return None
        if self._takes_closure and not self._evaluates_first:
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
        if call.closure is None or not self._takes_closure:
            call.returned.append(self.optimizer.step(*call.args, **call.kwargs))
            return
        known = self._known(call.result)
        try:
            call.returned.append(self.with_closure(call, known))
        except _EvaluatedElsewhere:
            if self._before is None:
                raise TypeError(
                    f"{type(self.optimizer).__name__}.step evaluates its closure behind a move of "
                    "the weights, which has no copy to be put back from; fastguard cannot guard it"
                ) from None
            self._before.restore()
            raise ClosureNeeded from None
        self._evaluates_first, self._before = True, None

    def with_closure(self, call: StepCall, closure: Callable[[], Any]) -> Any:
        """Steps with a closure; what `step` returns."""
        return self.optimizer.step(closure, *call.args[1:], **call.kwargs)

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
