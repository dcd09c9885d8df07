"""`check_batch`: finds NaN, Inf, constant and out-of-range tensors in a batch.

    low[t], high[t] = min and max of tensor t     (NaN propagates to both)

Each tensor is read once, by `aminmax`, on its own device; there is no sync until `problems()` is
called. The minimum and the maximum reveal NaN, Inf, constant values (both are equal) and values out
of range. If a tensor contains NaN, its other problems are not reported.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastguard.errors import nearest
from fastguard.errors.checked_numbers import number_of
from fastguard.errors.plain_text import printable
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.gradients.transfer import numbers_on

_INDEX = re.compile(r"\[(\d+)\]")
_COMPARABLE = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.float64}
"""Wider dtypes for integers that torch can store but not compare."""

Limit = float | Mapping[str, float] | None
Kind = Literal["nonfinite", "constant", "low", "high"]


class BatchProblem(NamedTuple):
    """One problem with a tensor of a batch.

    Attributes:
        name: The name of the tensor, such as `inputs` or `targets.boxes[2]`.
        kind: `"nonfinite"`, `"constant"`, `"low"` or `"high"`.
        detail: A description for users.
    """

    name: str
    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.name} {self.detail}"


@dataclass(frozen=True, slots=True)
class BatchCheck:
    """The result of reading a batch once.

    Attributes:
        names: Names of the T tensors.
        low, high: float64 `(T,)`, on the batch's device: smallest and largest element, NaN if the
            tensor contains NaN; +Inf and -Inf if it is empty.
        limits: Allowed `(low, high)` of each tensor; -Inf and Inf without a limit.
        constant_is_bad: Whether constant values are a problem, as they are for floating-point
            tensors with several elements.
    """

    names: tuple[str, ...]
    low: Tensor
    high: Tensor
    limits: tuple[tuple[float, float], ...]
    constant_is_bad: tuple[bool, ...]

    def signals(self, prefix: str = "batch.") -> dict[str, Tensor]:
        """Returns the result as losses for the guarded step. Never synchronizes.

        For each tensor there is one float64 `()`: 0 if the tensor is fine, 1 if it is constant or
        out of range, NaN if it is not finite. Pass these losses to the step:
        `opt.step(loss={"loss": loss, **check.signals()})`. The guard then skips the step of a
        non-finite batch on the device, regardless of the loss, and the record names the tensor.
        With `spike={"batch.inputs": Threshold(max=0.5)}`, constant and out-of-range tensors skip
        the step too; add `action="record"` to only record them.

        Args:
            prefix: Start of each name.

        Returns:
            The losses by name.
        """
        empty = self.low > self.high
        finite = self.low.isfinite() & self.high.isfinite()
        low = numbers_on([low for low, _ in self.limits], self.low.device)
        high = numbers_on([high for _, high in self.limits], self.low.device)
        may_not = numbers_on(self.constant_is_bad, self.low.device, torch.bool)
        constant = may_not & (self.low == self.high)
        bad = (constant | (self.low < low) | (self.high > high)) & ~empty
        value = torch.where(finite | empty, bad.double(), math.nan)
        return {prefix + name: v for name, v in zip(self.names, value.unbind(), strict=True)}

    def problems(self) -> list[BatchProblem]:
        """Returns the problems by tensor. Synchronizes with the GPU.

        Empty under `FakeTensorMode` and for meta tensors, which have no values.
        """
        if not has_numbers(self.low):
            return []
        return [
            problem
            for name, low, high, limits, constant_is_bad in zip(
                self.names,
                self.low.tolist(),
                self.high.tolist(),
                self.limits,
                self.constant_is_bad,
                strict=True,
            )
            for problem in _problems(name, low, high, limits, constant_is_bad)
        ]

    def __str__(self) -> str:
        """Returns one line per problem. Synchronizes with the GPU."""
        lines = (printable(str(problem)) for problem in self.problems())
        return "\n".join(lines) or "no problems in this batch"


def check_batch(
    batch: Any,
    *,
    low: Limit = None,
    high: Limit = None,
    names: Sequence[str] = ("inputs", "targets"),
) -> BatchCheck:
    """Reads every tensor of a batch once. Never synchronizes.

    Args:
        batch: A tensor, or nested dicts, lists and tuples of tensors; other values are ignored.
        low, high: Smallest and largest allowed value. A number applies to all floating-point
            tensors; a dict has limits by name or pattern: `{"inputs*": 1.0, "targets[2]": 9}`.
            None: no limit.
        names: Names for the first items of a list or tuple; later items are named `[2]`, and a lone
            tensor has the first name.

    Returns:
        The check; `problems()` describes problems, and `signals()` passes them to the guarded
        optimizer.

    Raises:
        TypeError: `low` or `high` is not a number.
        ValueError: A limit is NaN, a low limit is above the high one, a pattern matches no tensor,
            or the batch contains no tensors.

    Example:
        >>> import torch, fastguard
        >>> images = torch.tensor([[0.0, 0.5], [float("nan"), 1.0]])
        >>> labels = torch.tensor([3, 12])
        >>> check = fastguard.check_batch((images, labels), high={"targets": 9})
        >>> print(check)
        inputs holds NaN
        targets goes up to 12, above 9
    """
    check = read_batch(batch, low=low, high=high, names=names)
    if not check.names:
        raise ValueError(
            f"the batch, a {type(batch).__name__}, contains no tensor to check; "
            "pass a tensor, or dicts, lists and tuples of tensors"
        )
    for what, given in (("low", low), ("high", high)):
        for pattern in given if isinstance(given, Mapping) else ():
            if not any(_matches(name, pattern) for name in check.names):
                near = nearest(pattern, check.names)
                raise ValueError(f"{what}[{pattern!r}] matches no tensor of the batch{near}")
    return check


def read_batch(
    batch: Any, *, low: Limit = None, high: Limit = None, names: Sequence[str]
) -> BatchCheck:
    """Like `check_batch`, but allows batches without tensors and patterns without a match."""
    tensors = list(_leaves(batch, names))
    if not tensors:
        return BatchCheck((), torch.empty(0).double(), torch.empty(0).double(), (), ())
    home = next((t.device for _, t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    lows, highs = checked_limits("low", low), checked_limits("high", high)
    limits = tuple(
        (_limit(lows, t, name, -math.inf), _limit(highs, t, name, math.inf)) for name, t in tensors
    )
    for (name, _), (smallest, largest) in zip(tensors, limits, strict=True):
        if smallest > largest:
            raise ValueError(
                f"low={smallest} of {name} is above high={largest}; swap the two limits"
            )
    ends = torch.stack([_ends(t).to(home, non_blocking=True) for _, t in tensors], dim=1)
    return BatchCheck(
        names=tuple(name for name, _ in tensors),
        low=ends[0],
        high=ends[1],
        limits=limits,
        constant_is_bad=tuple(t.is_floating_point() and t.numel() > 1 for _, t in tensors),
    )


def _leaves(batch: Any, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, list | tuple):
        for i, part in enumerate(batch):
            yield from _named(part, names[i] if i < len(names) else f"[{i}]")
    elif isinstance(batch, Mapping):
        for key, part in batch.items():
            yield from _named(part, str(key))
    else:
        yield from _named(batch, names[0] if names else "batch")


def _named(part: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        yield name, part.detach()
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield from _named(value, f"{name}.{key}")
    elif isinstance(part, list | tuple):
        for i, value in enumerate(part):
            yield from _named(value, f"{name}[{i}]")


@torch.no_grad()
def _ends(x: Tensor) -> Tensor:
    """Returns float64 `(2,)`: minimum and maximum, in one read."""
    if x.layout is not torch.strided:
        # `coalesce` would synchronize with the GPU
        x = x._values() if x.layout is torch.sparse_coo else x.values()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    if x.dtype is torch.bool:
        x = x.view(torch.uint8)
    elif x.is_floating_point() and x.dtype.itemsize == 1:
        x = x.float()  # torch has no minimum for 8-bit floats
    x = x.to(_COMPARABLE.get(x.dtype, x.dtype))
    if not x.numel():
        return torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    return torch.stack(x.aminmax()).double()


def checked_limits(what: str, given: Limit) -> dict[str, float] | float | None:
    """Returns `low` or `high` as numbers.

    Raises:
        TypeError: A limit is not a number.
        ValueError: A limit is NaN.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {pattern: _number(f"{what}[{pattern!r}]", v) for pattern, v in given.items()}
    return _number(what, given)


def _number(name: str, value: object) -> float:
    number = number_of(name, value, "omit it for no limit")
    if math.isnan(number):
        raise ValueError(f"{name}={value!r} is NaN; use a number, or omit it for no limit")
    return number


@functools.lru_cache(maxsize=1024)
def _matches(name: str, pattern: str) -> bool:
    """Like `fnmatch`, except that `[2]` in a pattern is an index, as in a name."""
    return fnmatchcase(name, _INDEX.sub(r"[[]\1]", pattern))


def _limit(given: Mapping[str, float] | float | None, x: Tensor, name: str, none: float) -> float:
    if isinstance(given, Mapping):
        return next((v for pattern, v in given.items() if _matches(name, pattern)), none)
    return given if given is not None and x.is_floating_point() else none


def check_order(low: Limit, high: Limit) -> None:
    """Raises a ValueError if a low limit is above the high limit of the same name."""
    if isinstance(low, Mapping) and isinstance(high, Mapping):
        for name in low.keys() & high.keys():
            if low[name] > high[name]:
                raise ValueError(
                    f"low[{name!r}]={low[name]} is above high[{name!r}]={high[name]}; swap the two "
                    "limits"
                )
    elif isinstance(low, float) and isinstance(high, float) and low > high:
        raise ValueError(f"low={low} is above high={high}; swap the two limits")


def _problems(
    name: str, low: float, high: float, limits: tuple[float, float], constant_is_bad: bool
) -> Iterator[BatchProblem]:
    if math.isnan(low) or math.isnan(high):
        yield BatchProblem(name, "nonfinite", "holds NaN")
        return
    if low > high:  # an empty tensor
        return
    if math.isinf(low) or math.isinf(high):
        ends = ["-Inf"] * (low == -math.inf) + ["+Inf"] * (high == math.inf)
        yield BatchProblem(name, "nonfinite", f"holds {' and '.join(ends)}")
        return
    if constant_is_bad and low == high:
        yield BatchProblem(name, "constant", f"is {low:.6g} everywhere")
    if low < limits[0]:
        yield BatchProblem(name, "low", f"goes down to {low:.6g}, below {limits[0]:.6g}")
    if high > limits[1]:
        yield BatchProblem(name, "high", f"goes up to {high:.6g}, above {limits[1]:.6g}")
