"""Recognizes what a loss function received: logits, probabilities or log-probabilities.

A loss expects one of these kinds but does not check it: cross-entropy of probabilities, or the
negative log-likelihood of logits, silently gives a wrong number. Probabilities are recognized by
their sum over an axis. Numbers between 0 and 1 that do not sum to 1 may still be logits; they count
as probabilities only if the operation that produced them yields probabilities.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastguard.diagnosis.ctc_lengths import lengths_of, unaligned

Argument = Callable[..., Any]
"""A function `argument(position, *names, default)` that returns an argument of a call."""

TOLERANCE = 0.02
"""Tolerance for a sum of probabilities, which eps, smoothing or 16-bit rounding change slightly."""
ENOUGH = 32
"""Minimum number of values between 0 and 1 that are suspected to be probabilities."""

SIGMOID, SOFTMAX, LOG_SOFTMAX = "sigmoid", "softmax", "log_softmax"
_MAKES = {
    "sigmoid": SIGMOID,
    "sigmoid_": SIGMOID,
    "expit": SIGMOID,
    "hardsigmoid": SIGMOID,
    "softmax": SOFTMAX,
    "gumbel_softmax": SOFTMAX,
    "log_softmax": LOG_SOFTMAX,
    "logsigmoid": LOG_SOFTMAX,
}
# By autograd node, since compiled and scripted parts call no torch functions.
_MADE_BY = {
    "Sigmoid": SIGMOID,
    "Softmax": SOFTMAX,
    "LogSoftmax": LOG_SOFTMAX,
    "LogSigmoid": LOG_SOFTMAX,
}
_SHAPES = frozenset(
    "View UnsafeView ReshapeAlias Squeeze Unsqueeze Transpose Permute T Select Slice Clone ToCopy "
    "Alias Expand".split()
)
_KEEPS = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze transpose permute movedim swapaxes expand "
    "__getitem__ __get__ select narrow index_select gather masked_select take_along_dim contiguous "
    "clone float double half bfloat16 to type clamp clamp_ clip nan_to_num chunk split unbind cat "
    "stack view_as reshape_as t".split()
)


@dataclass(frozen=True, slots=True)
class LossInput:
    """An argument of a loss function that is not of the expected kind.

    Attributes:
        function: The loss function.
        argument: `"input"` or `"target"`.
        problem: `"activated"`: the activation that the loss applies was already applied. `"twice"`:
            the same, but applying the activation twice changes nothing. `"form"`: there is one
            logarithm too few or too many. `"axis"`: normalized over an axis other than the classes.
            `"swapped"`: input and target are exchanged. `"length"`: targets longer than their
            inputs are dropped from the loss.
        seen: A description.
        is_certain: Whether there is more evidence than the range of the values; for `"length"`,
            whether no sample is left.
        classes: Number of classes.
    """

    function: str
    argument: str
    problem: str
    seen: str
    is_certain: bool = True
    classes: int = 0


class Makers:
    """Remembers which activation produced a tensor, even after changes of shape or dtype."""

    def __init__(self) -> None:
        # The keys are ids of tensors. Holding the tensors prevents reuse of their ids.
        self._made: dict[int, tuple[Tensor, str]] = {}

    def of(self, tensor: Any) -> str:
        """Returns the activation, or an empty string if none is known."""
        return self._made.get(id(tensor), (None, ""))[1] or _MADE_BY.get(_maker_node(tensor), "")

    def note(self, function: str, given: Sequence[Tensor], out: Any) -> None:
        """Records that this function produced `out` from `given`."""
        made = _MAKES.get(function, "")
        if not made and function in _KEEPS and self._made:
            makers = {self.of(t) for t in given if t.is_floating_point()}
            made = makers.pop() if len(makers) == 1 else ""
        outs = out if isinstance(out, list | tuple) else (out,)
        for tensor in outs:
            if isinstance(tensor, Tensor):
                if made and tensor.is_floating_point():
                    self._made[id(tensor)] = (tensor, made)
                else:
                    # another operation overwrote the tensor in place
                    self._made.pop(id(tensor), None)

    def forget(self) -> None:
        """Releases the tensors."""
        self._made.clear()


def find_problems(
    function: str, argument: Argument, makers: Makers, in_loss: bool
) -> Iterable[LossInput]:
    """Returns the problems with the arguments of a function; empty if it is not a loss.

    Args:
        function: Name of the torch function.
        argument: Finds its arguments.
        makers: The activations that produced its inputs.
        in_loss: Whether the model has already returned, so that the call belongs to the loss.
    """
    check = _CHECKS.get(function) or (_HANDWRITTEN.get(function) if in_loss else None)
    if check is None:
        return ()
    first = argument(0, "input", "log_probs")
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.numel() < 2:
        return ()
    if bool(first.isnan().any()) or bool((first == math.inf).any()):
        return ()  # other checks report an empty input
    return check(function, first, argument, makers)


def _cross_entropy(name: str, x: Tensor, argument: Argument, makers: Makers) -> list[LossInput]:
    axis = min(1, x.ndim - 1)
    classes = x.shape[axis]
    if classes < 2:
        return []
    form, over = form_of(x, axis)
    made = makers.of(x)
    if form == "probabilities" and over == axis:
        seen = f"cross_entropy got probabilities: each {classes} of them sum to 1"
        return [LossInput(name, "input", "activated", seen, classes=classes)]
    if form == "probabilities" and made != SIGMOID:
        return [
            LossInput(name, "input", "axis", _wrong_axis(name, form, over, axis), classes=classes)
        ]
    if made == SIGMOID and _in_unit(x):
        seen = "cross_entropy got the output of a sigmoid"
        return [LossInput(name, "input", "activated", seen, classes=classes)]
    if form == "log-probabilities" and over == axis and made == LOG_SOFTMAX:
        seen = "cross_entropy got log-probabilities, the output of log_softmax"
        return [LossInput(name, "input", "twice", seen)]
    if not form and made == SOFTMAX and _in_unit(x):
        seen = f"{name} got the output of a softmax that was not over its classes, axis {axis}"
        return [LossInput(name, "input", "axis", seen, classes=classes)]
    if form == "log-probabilities" and over != axis and made == LOG_SOFTMAX:
        return [
            LossInput(name, "input", "axis", _wrong_axis(name, form, over, axis), classes=classes)
        ]
    return []


def _binary(name: str, x: Tensor, argument: Argument, makers: Makers) -> list[LossInput]:
    made = makers.of(x)
    if made == LOG_SOFTMAX:
        seen = f"{name} got logarithms of probabilities, so no predicted probability exceeds 0.5"
        return [LossInput(name, "input", "form", seen)]
    if not _in_unit(x):
        return []
    if made in (SIGMOID, SOFTMAX):
        return [LossInput(name, "input", "activated", f"{name} got the output of a {made}")]
    if x.numel() < ENOUGH or not _is_bounded_by_hand(x):
        return []
    low, high = (float(end) for end in x.aminmax())
    seen = f"{name} got {x.numel()} numbers that all lie between {low:.3g} and {high:.3g}"
    return [LossInput(name, "input", "activated", seen, is_certain=False)]


def _likelihood(name: str, x: Tensor, argument: Argument, makers: Makers) -> list[LossInput]:
    axis = x.ndim - 1 if name == "ctc_loss" else min(1, x.ndim - 1)
    form, over = form_of(x, axis)
    if x.shape[axis] < 2 or (form == "log-probabilities" and over == axis):
        return []
    if form in ("probabilities", "log-probabilities") and over != axis:
        return [LossInput(name, "input", "axis", _wrong_axis(name, form, over, axis))]
    if not form and makers.of(x) == LOG_SOFTMAX:
        seen = f"{name} got the output of a log_softmax that was not over its classes, axis {axis}"
        return [LossInput(name, "input", "axis", seen)]
    what = form if form == "probabilities" else "numbers that are not log-probabilities (logits?)"
    sums = x.detach().float().exp().sum(axis)
    seen = f"{name} got {what}: the sum of exp over the classes is {_between(sums)}, not 1"
    return [LossInput(name, "input", "form", seen)]


def _ctc(name: str, x: Tensor, argument: Argument, makers: Makers) -> list[LossInput]:
    targets, inputs, lengths = (
        argument(i, what)
        for i, what in enumerate(("targets", "input_lengths", "target_lengths"), start=1)
    )
    found = _likelihood(name, x, argument, makers)
    # Without zero_infinity the loss is Inf, which the check of non-finite losses reports.
    if not argument(6, "zero_infinity") or not isinstance(targets, Tensor):
        return found
    samples, n = list(unaligned(targets, inputs, lengths)), len(lengths_of(lengths))
    if samples:
        seen = f"{len(samples)} of {n} samples cannot be aligned: {samples[0]}"
        found.append(LossInput(name, "target", "length", seen, is_certain=len(samples) == n))
    return found


def _binary_likelihood(name: str, x: Tensor, argument: Argument, makers: Makers) -> list[LossInput]:
    low, high = (float(end) for end in x.aminmax())
    if low >= 0 and high <= 1:
        return []
    seen = f"{name} got numbers from {low:.4g} to {high:.4g} instead of probabilities"
    return [LossInput(name, "input", "form", seen)]


def _divergence(name: str, x: Tensor, argument: Argument, makers: Makers) -> list[LossInput]:
    target = argument(1, "target")
    log_target = bool(argument(5, "log_target"))
    if not isinstance(target, Tensor) or not target.is_floating_point() or target.numel() < 2:
        return []
    (first, over), (second, _) = form_of(x, x.ndim - 1), form_of(target, target.ndim - 1)
    wanted = "log-probabilities" if log_target else "probabilities"
    if first == "probabilities" and second == "log-probabilities" and not log_target:
        seen = "kl_div got probabilities as input and log-probabilities as target"
        return [LossInput(name, "input", "swapped", seen)]
    found = []
    if first == "probabilities" or (not first and bool((x > TOLERANCE).any())):
        what = first or "positive numbers (logits?)"
        found.append(LossInput(name, "input", "form", f"kl_div got {what} as its input"))
    if second and second != wanted:
        seen = f"kl_div got {second} as its target, with log_target={log_target}"
        found.append(LossInput(name, "target", "form", seen))
    elif not second and not log_target and bool((target < 0).any()):
        seen = f"kl_div got negative numbers as its target, with log_target={log_target}"
        found.append(LossInput(name, "target", "form", seen))
    if not found and target.requires_grad and not x.requires_grad:
        seen = "the gradient flows only through the target of kl_div, not through its input"
        found.append(LossInput(name, "input", "swapped", seen, is_certain=False))
    if not found and over == 0 and x.ndim > 1 and first and makers.of(x) == LOG_SOFTMAX:
        seen = _wrong_axis(name, first, over, x.ndim - 1)
        found.append(LossInput(name, "input", "axis", seen))
    return found


def _activated_twice(name: str, x: Tensor, argument: Argument, makers: Makers) -> list[LossInput]:
    """Checks a hand-written loss whose first function is an activation."""
    made = makers.of(x)
    if made not in (SIGMOID, SOFTMAX) or not _in_unit(x):
        return []
    return [LossInput(name, "input", "activated", f"{name} in the loss got the output of a {made}")]


LossCheck = Callable[[str, Tensor, Argument, Makers], list[LossInput]]
_CHECKS: dict[str, LossCheck] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy_with_logits": _binary,
    "multilabel_soft_margin_loss": _binary,
    "nll_loss": _likelihood,
    "ctc_loss": _ctc,
    "binary_cross_entropy": _binary_likelihood,
    "kl_div": _divergence,
}
_HANDWRITTEN: dict[str, LossCheck] = dict.fromkeys(
    ("softmax", "log_softmax", "logsumexp", "sigmoid", "logsigmoid"), _activated_twice
)


# Forms.


def form_of(x: Tensor, axis: int) -> tuple[str, int]:
    """Returns `"probabilities"`, `"log-probabilities"` or `""`, and the axis of the sum of 1.

    The class axis is tried first, then the other axes with several elements.
    """
    x = x.detach()
    high = float(x.max())
    if math.isnan(high) or high > 1 + TOLERANCE:
        return "", axis
    low = float(x.min())
    # If all values are 0, they are logarithms of 1, not probabilities.
    is_linear = low >= 0 and high > 0
    if not is_linear and high > TOLERANCE:
        return "", axis
    wide = x if x.dtype is torch.float64 else x.float()  # takes no more memory than the loss itself
    mass = wide if is_linear else wide.exp()
    others = [i for i in range(x.ndim) if i != axis]
    for i in [axis, *others]:
        if x.shape[i] > 1 and bool(((mass.sum(i) - 1).abs() < TOLERANCE).all()):
            return "probabilities" if is_linear else "log-probabilities", i
    return "", axis


def _is_bounded_by_hand(x: Tensor) -> bool:
    """Whether the tensor looks like a handwritten sigmoid or clamp, such as `1 / (1 + exp(-z))`.

    The values alone prove nothing, since a layer's output may lie between 0 and 1 by chance.
    """
    node = _below_shapes(x)
    if node is None:
        return False
    name, below = node.name(), [n for n, _ in node.next_functions if n is not None]
    if name.startswith("Mul"):  # `1 / y` is `y.reciprocal() * 1`
        return any(n.name().startswith("Reciprocal") for n in below)
    return name.startswith(("Reciprocal", "Clamp")) or (name.startswith("Div") and len(below) == 2)


def _below_shapes(x: Tensor) -> Any:
    """Returns the autograd node of the last operation that did more than change the shape."""
    node = x.grad_fn
    while node is not None and _operation(node) in _SHAPES:
        node = node.next_functions[0][0]
    return node


def _maker_node(x: Any) -> str:
    node = _below_shapes(x) if isinstance(x, Tensor) else None
    return "" if node is None else _operation(node)


def _operation(node: Any) -> str:
    """Returns `Sigmoid` for `SigmoidBackward0`."""
    return re.sub(r"Backward\d+$", "", node.name())


def _in_unit(x: Tensor) -> bool:
    low, high = (float(end) for end in x.detach().aminmax())
    return low >= 0 and high <= 1


def _between(sums: Tensor) -> str:
    low, high = (float(end) for end in sums.aminmax())
    return f"{low:.3g}" if high - low < 1e-3 * abs(high) else f"{low:.3g} to {high:.3g}"


def _wrong_axis(name: str, form: str, over: int, axis: int) -> str:
    batch = ", the samples of the batch" if over == 0 else ""
    return f"{name} got {form} over axis {over}{batch}; its classes are on axis {axis}"


def argument_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Argument:
    """Returns a function that finds an argument of a call by position or by name."""

    def argument(i: int, *names: str) -> Any:
        named = (kwargs[n] for n in names if n in kwargs)
        return args[i] if i < len(args) else next(named, None)

    return argument
