"""Maps parameters to segments (one clip coefficient each), and segments to limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastguard.functional.arguments import limit_of
from fastguard.gradients.transfer import numbers_on
from fastguard.stages.agc import AGC
from fastguard.stages.contract import NonFinite, Policy
from fastguard.stages.limit_rules import AdaptiveLimit
from fastguard.stages.spike_rules import Rule

Limit = float | AdaptiveLimit | AGC
ClipScope = Literal["global", "group", "tensor", "unit"]
SCOPES = ("global", "group", "tensor", "unit")


@dataclass(frozen=True, slots=True)
class Layout:
    """The parameters of an optimizer in the order that the guard uses.

    Attributes:
        parameters: All T parameters, group after group.
        segments: The segment of each parameter; None if there is just one segment.
        n_segments: S.
        names: The name of each parameter; for a shared parameter, the first one.
    """

    parameters: list[Tensor]
    segments: Sequence[int] | None
    n_segments: int
    names: list[str]


def lay_out(
    groups: Sequence[Mapping[str, Any]], scope: ClipScope, names: Mapping[Tensor, str]
) -> Layout:
    """Returns the layout of param groups.

    Args:
        groups: `optimizer.param_groups`.
        scope: What one clip coefficient applies to.
        names: Names by parameter; other parameters get the name in the param group, or a number.
    """
    parameters: list[Tensor] = []
    labels: list[str] = []
    segments: list[int] = []
    for g, group in enumerate(groups):
        given = group.get("param_names") or [None] * len(group["params"])
        for p, label in zip(group["params"], given, strict=True):
            labels.append(names.get(p) or label or f"parameter {len(parameters)}")
            parameters.append(p)
            segments.append(g)
    if scope in ("global", "unit"):  # units are not segments, see `stages.units`
        return Layout(parameters, None, 1, labels)
    if scope == "group":
        return Layout(parameters, segments, len(groups), labels)
    return Layout(parameters, range(len(parameters)), len(parameters), labels)


def limits(
    groups: Sequence[Mapping[str, Any]], scope: ClipScope, max_norm: Limit | None
) -> tuple[Limit, ...]:
    """Returns one limit per param group for scope `"group"`, otherwise a single limit.

    A number as `max_norm` of a param group overrides the argument.

    Raises:
        TypeError, ValueError: A group's `max_norm` is not a valid limit, or is not allowed by the
            scope.
    """
    check_units(scope, max_norm)
    own = [group.get("max_norm") for group in groups]
    if scope != "group":
        given = next((m for m in own if m is not None), None)
        if given is not None:
            raise ValueError(
                f"a param group has max_norm={given!r}, but clip_scope={scope!r}; "
                "use clip_scope='group' to clip param groups separately"
            )
        return (checked_limit(max_norm),)
    return tuple(checked_limit(max_norm) if m is None else _number(m) for m in own)


def policy_of(
    limits: Sequence[Limit],
    scope: ClipScope,
    norm_type: float,
    n_segments: int,
    device: torch.device,
    nonfinite: NonFinite,
    rules: Mapping[str, Rule],
) -> Policy:
    """Returns the policy for the result of `limits` and the other settings."""
    adaptive = next((m for m in limits if isinstance(m, AdaptiveLimit)), None)
    agc = next((m for m in limits if isinstance(m, AGC)), None)
    if adaptive is None:
        numbers = [m if isinstance(m, float) else math.inf for m in limits]
        return Policy(
            numbers_on(numbers, device),
            nonfinite,
            tuple(rules.values()),
            tuple(rules),
            limited=min(numbers, default=math.inf) != math.inf,
            joint_limit=joint_limit(numbers, scope, norm_type, n_segments),
            agc=agc,
        )
    own = [m if isinstance(m, float) else math.nan for m in limits]
    return Policy(
        numbers_on([math.inf] * n_segments, device),
        nonfinite,
        tuple(rules.values()),
        tuple(rules),
        joint_limit=numbers_on([math.inf], device)[0],
        adaptive=adaptive,
        own=None if all(map(math.isnan, own)) else numbers_on(own, device),
        on_host=n_segments == 1 and device.type == "cpu" and adaptive.on_host is not None,
    )


def joint_limit(
    limits: Sequence[float], scope: ClipScope, norm_type: float, n_segments: int
) -> float:
    """Returns the norm of the whole model if every segment is at its limit; inf if unlimited.

    Args:
        limits: One limit per segment, or one for all.
        scope: What one clip coefficient applies to.
        norm_type: p > 0.
        n_segments: S.
    """
    each = tuple(limits) * n_segments if scope == "tensor" else tuple(limits)
    largest = max(each, default=math.inf)
    if norm_type == math.inf or largest in (0.0, math.inf):
        return largest
    return largest * sum((limit / largest) ** norm_type for limit in each) ** (1 / norm_type)


def checked_limit(max_norm: object) -> Limit:
    """Returns a valid limit for the argument `max_norm`; `inf` for None."""
    if isinstance(max_norm, AdaptiveLimit | AGC):
        return max_norm
    return math.inf if max_norm is None else _number(max_norm)


def check_units(scope: ClipScope, max_norm: object) -> None:
    """Raises a ValueError if only one of `AGC` and `clip_scope="unit"` is used."""
    if (scope == "unit") == isinstance(max_norm, AGC):
        return
    if scope == "unit":
        raise ValueError(
            f"clip_scope='unit' needs max_norm=fastguard.AGC(), but max_norm={max_norm!r}; pass "
            "that, or another clip_scope"
        )
    raise ValueError(
        f"max_norm={max_norm!r} limits units, but clip_scope={scope!r}; pass clip_scope='unit'"
    )


def _number(max_norm: object) -> float:
    if isinstance(max_norm, AdaptiveLimit | AGC):
        raise TypeError(
            f"a param group has max_norm={max_norm!r}, which must be a number; pass the rule as "
            "GuardedOptimizer(max_norm=...), where it applies to all groups without a number"
        )
    if isinstance(max_norm, type) and issubclass(max_norm, AdaptiveLimit | AGC):
        name = max_norm.__name__
        raise TypeError(f"max_norm is the class {name}; pass a rule, max_norm={name}()")
    return limit_of("max_norm", max_norm, quiet=True)


def clip_values(groups: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Returns the param groups that have a `clip_value`, with the value."""
    return [
        (g, limit_of("clip_value", g["clip_value"], quiet=True))
        for g in groups
        if g.get("clip_value") is not None
    ]
