"""Calling the `step` of the wrapped optimizer: its arguments and its closure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from fastguard.found_inf import knows_found_inf

CLOSURES = ("closure", "fn", "func")
"""What the names of parameters contain that take a function."""


@dataclass(slots=True)
class StepCall:
    """One call of `GuardedOptimizer.step`, as far as it concerns the wrapped optimizer.

    Attributes:
        closure: Evaluates the model and returns the loss; None: there is none.
        args, kwargs: All other arguments for the wrapped optimizer.
        returned: What its `step` returned, noted in the same line: no interrupt comes between.
    """

    closure: Callable[[], Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    returned: list[Any] = field(default_factory=list)


class StepSignature(NamedTuple):
    """What the `step` of an optimizer takes.

    Attributes:
        first: The name of its first positional parameter; None: it has none.
        needs_closure: Whether it cannot be called without its closure.
        shared: Those of the guard's own keyword arguments that it takes too.
    """

    first: str | None = "closure"
    needs_closure: bool = False
    shared: frozenset[str] = frozenset()

    @staticmethod
    def of(optimizer: Optimizer) -> StepSignature:
        try:
            parameters = inspect.signature(optimizer.step).parameters.values()
        except (TypeError, ValueError):  # some callables of C have none
            return StepSignature()
        positional = [
            p
            for p in parameters
            # A scheduler puts a function on the instance that looks like the unbound method.
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"
        ]
        first = positional[0] if positional else None
        shared = {"loss", "tag"} & {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        return StepSignature(
            None if first is None else first.name,
            first is not None and _is_closure(first.name) and first.default is first.empty,
            frozenset(shared),
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
        if given is not None and self.first is not None and not _is_closure(self.first):
            return StepCall(None, (given, *args), kwargs)
        return StepCall(checked_closure(given), (None, *args) if args else (), kwargs)


class ClosureNeeded(Exception):
    """The step of an optimizer cannot do without its closure; no weight has moved."""


class InnerStep:
    """Calls the `step` of an optimizer.

    Args:
        optimizer: The wrapped one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._goes_without = False  # it has stepped without its closure

    def __call__(self, call: StepCall) -> None:
        """Steps without the closure, which has been evaluated.

        Raises:
            ClosureNeeded: The optimizer asks for the closure: it evaluates the model elsewhere too.
        """
        if call.closure is None or self._goes_without:
            call.returned.append(self.optimizer.step(*call.args, **call.kwargs))
            return
        before = self._versions()
        try:
            call.returned.append(self.optimizer.step(*call.args, **call.kwargs))
        except Exception as error:
            if not _asks_for_closure(error):
                raise
            if self._versions() != before:
                raise TypeError(
                    f"{type(self.optimizer).__name__}.step needs its closure, and said so after it "
                    "had moved weights; fastguard cannot guard it"
                ) from error
            raise ClosureNeeded from error
        self._goes_without = True

    def _versions(self) -> list[int]:
        return [p._version for group in self.optimizer.param_groups for p in group["params"]]

    def with_closure(self, call: StepCall, closure: Callable[[], Any]) -> Any:
        """Steps with a closure; what `step` returns."""
        return self.optimizer.step(closure, *call.args[1:], **call.kwargs)


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


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What the closure of a step returns, with gradients as in torch; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _asks_for_closure(error: Exception) -> bool:
    """Whether a step failed for want of its closure: it says so, or it has called None."""
    text = str(error)
    return "closure" in text.lower() or "'NoneType' object is not callable" in text


def _is_closure(name: str) -> bool:
    return any(part in name for part in CLOSURES)
