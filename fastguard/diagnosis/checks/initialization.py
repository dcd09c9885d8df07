"""Checks weights for NaN, equal values and unusual scale, and the eps of normalizations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding
from fastguard.errors import describe_culprits
from fastguard.gradients.buckets import FLOATING, bucketize
from fastguard.stages.measure import measure

CHECK = Family("initialization")

# The gain of a random layer is the rms of its outputs divided by the rms of its inputs: 0.58 for
# torch's
# default nn.Linear, 1.4 for Kaiming, about 0.1 for small GPTs initialized with 0.02, and 0.01 for
# the last layer of a policy.
GAIN_HIGH, GAIN_LOW = 10.0, 0.009
GAIN_HOPELESS = 1e3  # with this gain, ten layers exceed the range of float32
NORM_EPS = 1e-12  # no published model has a smaller eps

_WEIGHTED = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def check(evidence: Evidence) -> Iterator[Finding]:
    """Checks parameters and buffers; runs nothing."""
    yield from _nonfinite(evidence)
    for module, name in evidence.subject.modules.items():
        if isinstance(module, _NORMS):
            yield from _norm(module, name)
        if isinstance(module, _WEIGHTED):
            yield from _weight(module, name)


def _nonfinite(evidence: Evidence) -> Iterator[Finding]:
    named = dict(evidence.subject.parameters)
    for prefix, root in evidence.subject.roots.items():
        named |= dict(root.named_buffers(prefix=prefix))
    # A buffer may contain -Inf by design, as a mask does.
    held = [(n, t.detach()) for n, t in named.items() if t.dtype in FLOATING and t.numel()]
    stats = measure(bucketize([t for _, t in held], names=[n for n, _ in held]))
    culprits = [c for c in stats.culprits() if c[0] in evidence.subject.parameters or c[1]]
    if culprits:
        yield CHECK.error(
            "nonfinite-weight",
            f"{len(culprits)} of {len(held)} tensors are not finite: {describe_culprits(culprits)}",
            where=culprits[0][0],
            value=sum(sum(c[1:]) for c in culprits),
            limit=0,
            remedy="if the model is new, check how this tensor is initialized (torch.empty is not "
            "initialized); otherwise an earlier step destroyed the tensor: go back to a "
            "checkpoint that passes `fastguard ckpt verify`, and train with "
            "fastguard.GuardedOptimizer.",
        )


def _norm(module: Any, name: str) -> Iterator[Finding]:
    eps = module.eps
    if eps is not None and eps < NORM_EPS:  # with None, torch uses the eps of the dtype
        yield CHECK.warning(
            "norm-eps",
            f"eps is {eps:g}: so constant inputs are divided by 0",
            where=name,
            value=eps,
            limit=NORM_EPS,
            remedy="use torch's default, eps=1e-5 (1e-6 for RMSNorm).",
        )
    variance = getattr(module, "running_var", None)
    if isinstance(variance, Tensor) and bool((variance < 0).any()):
        yield CHECK.error(
            "negative-variance",
            f"the running variance goes down to {float(variance.min()):.3g}; evaluation takes its "
            "square root, which is NaN",
            where=name,
            value=float(variance.min()),
            limit=0,
            remedy="call module.reset_running_stats() and run some batches in training mode; "
            "averaged checkpoints and incomplete loading can cause a negative variance.",
        )


@torch.no_grad()
def _weight(module: Any, name: str) -> Iterator[Finding]:
    weight = module.weight.detach()
    if weight.numel() < 2 or not weight.is_floating_point() or not weight.isfinite().all():
        return
    low, high = (float(end) for end in weight.aminmax())
    if low == high:
        yield _constant(name, low)
        return
    fan_in = _fan_in(module)
    gain = float(weight.double().square().mean().sqrt()) * math.sqrt(fan_in)
    if GAIN_LOW <= gain <= GAIN_HIGH:
        return
    too = "large" if gain > 1 else "small"
    yield Finding(
        CHECK,
        "extreme-gain",
        "error" if gain > GAIN_HOPELESS or gain < 1 / GAIN_HOPELESS**2 else "warning",
        f"the weights amplify their input by a factor of {gain:.3g} (rms of the weights times "
        f"the square root of {fan_in} inputs), which is too {too}",
        where=name,
        value=gain,
        limit=GAIN_HIGH if gain > 1 else GAIN_LOW,
        remedy="use torch.nn.init.kaiming_normal_(weight) before ReLUs, xavier_uniform_ before "
        "tanh or no activation; set biases to 0.",
    )


def _constant(name: str, value: float) -> Finding:
    if value == 0:
        return CHECK.warning(
            "zero-weight",
            "every weight is 0: earlier layers get no gradient until the weights have changed",
            where=name,
            limit=0,
            remedy="this is fine for the last layer of a residual branch or an adapter; elsewhere "
            "use torch.nn.init.kaiming_normal_(weight).",
        )
    return CHECK.warning(
        "constant-weight",
        f"every weight is {value:.3g}: all units compute the same value and remain identical",
        where=name,
        value=value,
        remedy="start from random weights, for example with torch.nn.init.kaiming_normal_(weight).",
    )


def _fan_in(module: Any) -> int:
    """Returns the number of inputs that are summed into one output."""
    shape = module.weight.shape
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # (in, out / groups, *kernel)
        overlap = math.prod(math.ceil(k / s) for k, s in zip(shape[2:], module.stride, strict=True))
        return shape[0] // module.groups * overlap
    return max(1, math.prod(shape[1:]))
