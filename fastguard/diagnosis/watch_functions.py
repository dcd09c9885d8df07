"""`FunctionWatch`: records every torch function called in a step, with its arguments.

Module hooks see neither a loss function nor `torch.sigmoid` inside a forward. This class tracks
which tensors come from the model's output and which from the targets. It finds functions that
combine the two with different shapes, class indices out of range, and saturated activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastguard.diagnosis.loss_inputs import Argument, LossInput, Makers, argument_of, find_problems
from fastguard.diagnosis.replay.subject import is_readable, tensors

Shape = tuple[int, ...]

# These functions broadcast without an error; some only emit a Python warning.
ELEMENTWISE_LOSSES = frozenset(
    "mse_loss l1_loss smooth_l1_loss huber_loss kl_div poisson_nll_loss gaussian_nll_loss "
    "soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits".split()
)
ARITHMETIC = frozenset("sub __sub__ rsub __rsub__ mul __mul__ __rmul__".split())
_RESHAPE = frozenset("unsqueeze __getitem__ view reshape expand permute transpose".split())
_CLASS_LOSSES = frozenset(("cross_entropy", "nll_loss"))
_BINARY_LOSSES = frozenset(("binary_cross_entropy", "binary_cross_entropy_with_logits"))

FLOAT16_MAX = 65504.0
# Functions that autocast computes in float32 for any input.
_FLOAT32_IN_AUTOCAST = frozenset(
    "__get__ pow __pow__ exp expm1 sinh cosh tan log log10 log2 log1p reciprocal rsqrt softmax "
    "log_softmax layer_norm group_norm norm vector_norm cosine_similarity cdist dist prod cumprod "
    "cumsum sum renorm logsumexp".split()
)

OUTPUT, TARGET, RESHAPED = "output", "target", "reshaped"
_NONE: frozenset[str] = frozenset()


class IndexOutOfRange(IndexError):
    """Raised instead of torch's error, which would make the GPU unusable in this process."""


class NoProbability(ValueError):
    """Raised instead of torch's error for a binary cross-entropy of values outside [0, 1]."""


@dataclass(frozen=True, slots=True)
class ShapeMismatch:
    """A function call that combined an output and a target of different shapes.

    Attributes:
        function: The function.
        output, target: The shapes of output and target.
        result: The broadcast shape; None if they cannot be broadcast and the function raised.
        both_ways: Whether both were expanded, so that each output was compared with several
            targets.
    """

    function: str
    output: Shape
    target: Shape
    result: Shape | None
    both_ways: bool


@dataclass(frozen=True, slots=True)
class Indices:
    """Class indices passed to a loss, or indices passed to an embedding.

    Attributes:
        function: The function that received them.
        n: Number of classes or rows: 0 to n - 1 are allowed.
        ignored: The value of `ignore_index`, if any.
        low, high: Smallest and largest of the indices that are not ignored.
        bad_share: Share of indices out of range.
    """

    function: str
    n: int
    ignored: int | None
    low: int
    high: int
    bad_share: float


@dataclass(frozen=True, slots=True)
class Saturation:
    """How much of an activation is saturated, with a derivative of (almost) 0.

    Attributes:
        where: The module that called the activation.
        function: `"relu"`, `"sigmoid"`, `"tanh"`, `"softmax"`.
        share: Share of the elements, or of the rows of a softmax.
    """

    where: str
    function: Literal["relu", "sigmoid", "tanh", "softmax"]
    share: float


@dataclass(frozen=True, slots=True)
class Large:
    """A value inside the model that overflows in float16.

    Attributes:
        where: The module that computed the value.
        function: The function that computed the value.
        largest: Magnitude of the largest finite element.
    """

    where: str
    function: str
    largest: float


class FunctionWatch(TorchFunctionMode):
    """Records the torch functions of one step.

    Args:
        where: Returns the name of the running module; empty between modules.
        targets: The targets of the batch.

    Attributes:
        shape_mismatches, indices, saturations, large: Observations, in order.
        binary_targets: `(low, high)` of the targets passed to binary cross-entropies.
        loss_inputs: Arguments of losses that are not of the expected kind.
        over_first_axis: The module of each softmax over axis 0, and the size of that axis.
        raised: Name of the torch function that raised, if any.
    """

    def __init__(self, where: Callable[[], str], targets: Any) -> None:
        super().__init__()
        self.shape_mismatches: list[ShapeMismatch] = []
        self.indices: list[Indices] = []
        self.saturations: list[Saturation] = []
        self.large: list[Large] = []
        self.binary_targets: list[tuple[float, float]] = []
        self.loss_inputs: list[LossInput] = []
        self.over_first_axis: list[tuple[str, int]] = []
        self.raised: str | None = None
        self._makers = Makers()
        self._has_output = False
        self._where = where
        # The keys are ids of tensors. Holding the tensors prevents reuse of their ids.
        self._roles: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self._mark(targets, frozenset((TARGET,)))

    def mark_output(self, output: Any) -> None:
        """Marks tensors as the model's output."""
        self._has_output = True
        self._mark(output, frozenset((OUTPUT,)))

    def forget(self) -> None:
        """Releases the tensors."""
        self._roles.clear()
        self._makers.forget()

    def _mark(self, tree: Any, roles: frozenset[str]) -> None:
        for tensor in tensors(tree):
            self._roles[id(tensor)] = (tensor, roles)

    def _roles_of(self, tensor: Tensor) -> frozenset[str]:
        return self._roles.get(id(tensor), (None, _NONE))[1]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = tensors((args, kwargs))
        if not all(map(is_readable, given)):
            return func(*args, **kwargs)
        argument = argument_of(args, kwargs)
        with torch.no_grad():
            self._observe_indices(name, argument)
            self._observe_loss_inputs(name, argument)
            mismatch = self._shape_mismatch(name, given)
        try:
            out = func(*args, **kwargs)
        except Exception:
            self.raised = self.raised or name
            if mismatch is not None and mismatch.result is None:
                self.shape_mismatches.append(mismatch)
            raise
        if mismatch is not None and mismatch.result is not None:
            self.shape_mismatches.append(mismatch)
        self._makers.note(name, given, out)
        roles = _NONE.union(*map(self._roles_of, given))
        if roles:
            self._mark(out, roles | {RESHAPED} if name in _RESHAPE else roles)
        if isinstance(out, Tensor) and self._where():
            with torch.no_grad():
                self._observe_size(name, out)
                if name in ("softmax", "log_softmax") and out.ndim > 1:
                    if _axis(out, argument(1, "dim")) == 0:
                        self.over_first_axis.append((self._where(), out.shape[0]))
                if name in _SATURATED:
                    self._observe_saturation(name, out, args, kwargs)
        return out

    # Compares shapes.

    def _shape_mismatch(self, name: str, given: list[Tensor]) -> ShapeMismatch | None:
        if len(given) < 2 or not given[0].numel() > 1 < given[1].numel():
            return None
        first, second = given[:2]
        if first.shape == second.shape:
            return None
        roles = [self._roles_of(first) - {RESHAPED}, self._roles_of(second) - {RESHAPED}]
        if {OUTPUT} not in roles or {TARGET} not in roles:
            return None
        output, target = (first, second) if roles[0] == {OUTPUT} else (second, first)
        shapes = tuple(output.shape), tuple(target.shape)
        try:
            result = tuple(torch.broadcast_shapes(*shapes))
        except RuntimeError:
            return ShapeMismatch(name, *shapes, None, False)
        both_ways = result not in shapes
        deliberate = RESHAPED in self._roles_of(first) | self._roles_of(second)
        # If the code added an axis deliberately, it is meant to compare all pairs.
        outer = both_ways and len(shapes[0]) != len(shapes[1]) and not deliberate
        if name in ELEMENTWISE_LOSSES or (name in ARITHMETIC and outer):
            return ShapeMismatch(name, *shapes, result, both_ways)
        return None

    # Checks values.

    def _observe_indices(self, name: str, argument: Argument) -> None:
        first = argument(0, "input", "self")
        if name == "embedding":
            weight = argument(1, "weight")
            self._check_indices(name, first, weight.shape[0], None)
            return
        target = argument(1, "target", "other")
        if not isinstance(first, Tensor) or not isinstance(target, Tensor) or not target.numel():
            return
        if name in _CLASS_LOSSES and not target.is_floating_point() and first.ndim:
            ignored = argument(4, "ignore_index")
            n = first.shape[1] if first.ndim > 1 else first.shape[0]
            self._check_indices(name, target, n, -100 if ignored is None else ignored)
        elif name in _BINARY_LOSSES:
            low, high = target.aminmax()
            self.binary_targets.append((float(low), float(high)))

    def _observe_loss_inputs(self, name: str, argument: Argument) -> None:
        found = list(find_problems(name, argument, self._makers, self._has_output))
        self.loss_inputs += found
        if found and name == "binary_cross_entropy":
            self.raised = self.raised or name
            raise NoProbability(found[0].seen)

    def _check_indices(self, name: str, indices: Any, n: int, ignored: int | None) -> None:
        if not isinstance(indices, Tensor) or indices.is_floating_point() or not indices.numel():
            return
        found = indices_of(name, indices, n, ignored)
        self.indices.append(found)
        if found.bad_share:
            raise IndexOutOfRange(
                f"{name}: indices are {found.low} to {found.high}, but must be 0 to {n - 1}"
            )

    def _observe_size(self, name: str, out: Tensor) -> None:
        if not out.is_floating_point() or not out.numel() or name in _FLOAT32_IN_AUTOCAST:
            return
        if out.dtype.itemsize < 2 or out.layout is not torch.strided:
            return
        low, high = out.detach().aminmax()
        # The comparison is False for NaN, which other checks report.
        if max(-float(low), float(high)) > FLOAT16_MAX:
            size = out.detach().abs()
            largest = float(torch.where(size.isfinite(), size, torch.zeros_like(size)).max())
            if largest > FLOAT16_MAX:
                self.large.append(Large(self._where(), name, largest))

    def _observe_saturation(
        self, name: str, out: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        stuck = _SATURATED[name]
        if name == "softmax":
            out = out.amax(_axis(out, argument_of(args, kwargs)(1, "dim")))
        if out.numel() > 1:
            share = float(stuck(out).float().mean())
            self.saturations.append(Saturation(self._where(), name, share))  # type: ignore[arg-type]


def _axis(out: Tensor, dim: Any) -> int:
    """Returns the axis of a softmax, or torch's default axis."""
    if not isinstance(dim, int):
        return 0 if out.ndim in (0, 1, 3) else 1
    return dim % out.ndim if out.ndim else 0


def indices_of(name: str, indices: Tensor, n: int, ignored: int | None) -> Indices:
    """Summarizes class indices or embedding indices; synchronizes with the GPU."""
    counted = indices if ignored is None else indices[indices != ignored]
    if not counted.numel():
        return Indices(name, n, ignored, 0, 0, 0.0)
    low, high = (int(end) for end in counted.aminmax())
    bad = float(((counted < 0) | (counted >= n)).float().mean())
    return Indices(name, n, ignored, low, high, bad)


# Elements where the derivative is at most about a thousandth of its maximum.
_SATURATED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: y == 0,
    "sigmoid": lambda y: (y - 0.5).abs() > 0.4997,
    "tanh": lambda y: y.abs() > 0.9995,
    "softmax": lambda y: y > 0.9999,
}
