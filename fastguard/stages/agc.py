"""Adaptive gradient clipping (AGC): limits in proportion to the norm of the weights.

    limit of a unit = clip_factor * max(norm of its weights, eps)
    coefficient     = min(1, limit / norm of its gradient)

A unit holds the weights of one output. In a weight with two or more dimensions, each slice along
the first dimension is a unit (a row of a linear layer, a filter of a convolution); any other
parameter is a single unit. `timm.utils.agc` uses the same units. Source: Brock et al. 2021, arXiv
2102.06171, section 4.1.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from fastguard.errors import nearest
from fastguard.errors.checked_numbers import number_of
from fastguard.errors.plain_text import shown


@dataclass(frozen=True)
class AGC:
    """Clips each unit in proportion to its weights (Brock et al. 2021, arXiv 2102.06171).

    Use it as `GuardedOptimizer(max_norm=AGC(), clip_scope="unit")`; without an optimizer, use
    `fastguard.clip_grad_adaptive_`. A unit is one row of a linear layer or one filter of a
    convolution; a bias or a scalar is a single unit.

    Args:
        clip_factor: Limit of a unit's gradient norm, as a fraction of its weight norm. Default:
            0.01.
        eps: Lower bound for the norm of the weights, so that zero weights can learn. Default: 1e-3.
        exclude: Parameters that are not clipped: names of parameters, names of modules (`"head"`
            covers `head.weight` and `head.bias`), or patterns (`"*.bias"`). The paper excludes the
            last linear layer. Default: none.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `clip_factor` or `eps` is not a finite number > 0.

    Example:
        >>> AGC(exclude=("head",)).clip_factor
        0.01
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("clip_factor", "eps"):
            number = number_of(f"AGC {name}", getattr(self, name), "use a finite number > 0")
            if not 0 < number < math.inf:  # this form of the comparison also rejects NaN
                raise ValueError(f"AGC {name}={getattr(self, name)!r} must be a finite number > 0")
            # stored as float, so that ranks with 1 and 1.0 agree
            object.__setattr__(self, name, number)
        if isinstance(self.exclude, str) or not all(isinstance(e, str) for e in self.exclude):
            raise TypeError(
                f"AGC exclude={shown(self.exclude)} must be a list of names of parameters or "
                'modules; pass exclude=("head",)'
            )
        object.__setattr__(self, "exclude", tuple(self.exclude))


class UnitSummary(NamedTuple):
    """The units that were clipped in one bucket of tensors.

    Attributes:
        values: float64 `(4,)`, see `reference_units.summary_of`.
        positions: Position of each tensor of the bucket among all parameters.
        counts: Number of units of each tensor.
    """

    values: Tensor
    positions: Sequence[int]
    counts: Sequence[int]


class ClippedUnits(NamedTuple):
    """The units that were clipped in a step, as numbers.

    Attributes:
        n_clipped, n_units: Numbers of clipped units, and of units with a limit.
        position, unit: The position, among all parameters, of the parameter with the smallest
            coefficient, and the index of its unit. If several coefficients are NaN, any of their
            units; -1 if nothing was clipped.
    """

    n_clipped: int = 0
    n_units: int = 0
    position: int = -1
    unit: int = -1

    @staticmethod
    def of(summaries: Sequence[UnitSummary], numbers: Sequence[float]) -> ClippedUnits:
        """Returns the numbers of a step that was not skipped.

        Args:
            summaries: The summary of each bucket.
            numbers: The values of the summaries, concatenated.
        """
        n_units = sum(sum(summary.counts) for summary in summaries)
        n_clipped = sum(map(int, numbers[1::4]))
        if not n_clipped:
            return ClippedUnits(0, n_units)
        smallest = numbers[0::4]
        least = next((i for i, x in enumerate(smallest) if math.isnan(x)), None)
        if least is None:
            least = smallest.index(min(smallest))
        summary, (first, index) = summaries[least], map(int, numbers[4 * least + 2 : 4 * least + 4])
        starts = list(accumulate(summary.counts, initial=0))
        index += starts[first]
        tensor = bisect_right(starts, index) - 1
        return ClippedUnits(n_clipped, n_units, summary.positions[tensor], index - starts[tensor])


@dataclass(frozen=True, slots=True, eq=False)
class UnitLimits:
    """The limits of `AGC` for an update that clips the units of the gradients as it reads them.

    Attributes:
        numbers: float64 `(2,)` on the CPU: `clip_factor` and `eps`.
        limited: Whether each parameter of the optimizer is limited, in the order of the param
            groups.
        propagates: See `reference_units.unit_coefs`.
        inv_scale: float64 `()`: the factor that unscales the gradients; None: 1.
        clipped: What was clipped in each update, appended by the optimizer.
    """

    numbers: Tensor
    limited: Sequence[bool]
    propagates: bool = False
    inv_scale: Tensor | None = None
    clipped: list[UnitSummary] = field(default_factory=list)


def limited_positions(
    parameters: Sequence[Tensor], names: Sequence[str] | None, exclude: Iterable[str | Tensor]
) -> list[int]:
    """Returns the positions of the parameters that are not excluded.

    Raises:
        TypeError: An entry of `exclude` is neither a name nor a tensor.
        ValueError: An entry matches no parameter, so it is probably misspelled.
    """
    left_out: set[int] = set()
    for entry in exclude:
        if isinstance(entry, Tensor):
            found = {i for i, p in enumerate(parameters) if p is entry}
            what = f"a tensor of shape {tuple(entry.shape)}"
        elif isinstance(entry, str):
            found = _named(entry, names)
            what = repr(entry)
        else:
            raise TypeError(
                f"exclude holds {shown(entry)}, a {type(entry).__name__}; pass names of "
                "parameters or modules, or the parameters themselves"
            )
        if not found:
            raise ValueError(f"exclude holds {what}, which {_remedy(entry, names)}")
        left_out |= found
    return [i for i in range(len(parameters)) if i not in left_out]


def _named(entry: str, names: Sequence[str] | None) -> set[int]:
    return {
        i
        for i, name in enumerate(names or ())
        if name == entry or name.startswith(f"{entry}.") or fnmatchcase(name, entry)
    }


def _remedy(entry: str | Tensor, names: Collection[str] | None) -> str:
    if isinstance(entry, Tensor):
        return "is not one of the parameters; pass a parameter of the model"
    if names is None:
        return "matches nothing, since the parameters have no names; pass model.named_parameters()"
    modules = {name.rsplit(".", 1)[0] for name in names}
    return f"matches no parameter{nearest(entry, [*names, *sorted(modules)])}"
