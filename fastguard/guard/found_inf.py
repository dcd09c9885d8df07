"""Checks whether `found_inf` skips the whole step of an optimizer.

torch's fused optimizers declare this ability with `_step_supports_amp_scaling`. The attribute alone
proves nothing. An optimizer that wraps a fused one may forward its attributes, but `found_inf` is
set on the wrapper and not on the optimizer inside. A class that extends the `step` of a fused
optimizer (by an average of the weights, or a projection) would run its own code even when the
kernel skips.
"""

from __future__ import annotations

from functools import lru_cache
from inspect import unwrap

from torch.optim import Optimizer

_CLAIM = "_step_supports_amp_scaling"


def reads_found_inf(optimizer: Optimizer) -> bool:
    """Whether the kernels of an optimizer read `found_inf`, in every param group.

    The groups may change at any time, by hand or by loading a state dict. With both `foreach` and
    `fused`, torch's SGD uses `foreach` and refuses `found_inf`.
    """
    return _supports_found_inf(optimizer) and all(
        group.get("fused") and not group.get("foreach") for group in optimizer.param_groups
    )


def _supports_found_inf(optimizer: Optimizer) -> bool:
    """Whether a step of the fused kernels changes nothing while `found_inf` is 1."""
    kind = type(optimizer)
    own = vars(optimizer).get(_CLAIM)  # torch sets the attribute on the instance
    claims = _class_claims(kind) if own is None else own
    return bool(claims) and _steps_as_torch(kind)


@lru_cache(maxsize=64)
def _class_claims(kind: type[Optimizer]) -> bool:
    return any(vars(base).get(_CLAIM, False) for base in kind.__mro__)


@lru_cache(maxsize=64)
def _steps_as_torch(kind: type[Optimizer]) -> bool:
    """Whether a class that derives from an optimizer of torch inherits its `step` unchanged."""
    for base in kind.__mro__:
        if base is not Optimizer and f"{base.__module__}.".startswith("torch.optim."):
            # Creating an instance wraps `step` to run hooks.
            return unwrap(kind.step) is unwrap(base.step)
    return True  # a class that derives from no torch optimizer implements the protocol itself
