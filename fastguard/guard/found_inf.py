"""Whether an optimizer obeys `found_inf`, all of its step.

torch's fused optimizers say so with `_step_supports_amp_scaling`. That answer is not to be had from
another one: an optimizer around a fused one may pass on its attributes, but `found_inf` is set on
it and not on the one inside. And a class that adds to the `step` of a fused one (an average of the
weights, a projection) would do its part of a step that the kernel does not take.
"""

from __future__ import annotations

from functools import lru_cache
from inspect import unwrap

from torch.optim import Optimizer

_CLAIM = "_step_supports_amp_scaling"


def knows_found_inf(optimizer: Optimizer) -> bool:
    """Whether nothing happens in a step of its fused kernels while its `found_inf` is 1."""
    kind = type(optimizer)
    own = vars(optimizer).get(_CLAIM)  # torch sets it on the instance
    claims = _class_claims(kind) if own is None else own
    return bool(claims) and _steps_as_torch(kind)


@lru_cache(maxsize=64)
def _class_claims(kind: type[Optimizer]) -> bool:
    return any(vars(base).get(_CLAIM, False) for base in kind.__mro__)


@lru_cache(maxsize=64)
def _steps_as_torch(kind: type[Optimizer]) -> bool:
    """Whether its step is that of torch's optimizer, where it derives from one of torch's."""
    for base in kind.__mro__:
        if base is not Optimizer and f"{base.__module__}.".startswith("torch.optim."):
            # Making an instance puts wrappers for hooks around `step`.
            return unwrap(kind.step) is unwrap(base.step)
    return True  # it knows the protocol by itself
