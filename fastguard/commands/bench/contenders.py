"""The contenders that clip gradients: fastguard's variants and the usual alternatives.

Each contender is a function `(workload) -> Prepared`. A contender that cannot run raises
`Unavailable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import fastguard
from fastguard.commands.bench.workload import Workload

# Saved at import, so that `patch_torch` cannot change the baseline.
torch_clip: Callable[..., Tensor] = torch.nn.utils.clip_grad_norm_


class Unavailable(Exception):
    """A contender cannot run on this machine or in this case; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """One contender, ready to be measured.

    Attributes:
        call: Clips once; returns the norm, or None if it does not compute one.
        restore: Restores gradients that `call` may have changed.
        parameters: The parameters whose `.grad` it uses.
    """

    call: Callable[[], Tensor | None]
    restore: Callable[[], None]
    parameters: Sequence[Tensor]


def on_parameters(work: Workload, call: Callable[[], Tensor | None]) -> Prepared:
    """A call that clips the workload's own parameters."""
    return Prepared(call, work.restore, work.parameters)


def torch_foreach(work: Workload) -> Prepared:
    """`torch.nn.utils.clip_grad_norm_(foreach=True)`."""
    zero_first = work.case.situation == "one NaN, zeroed"
    parameters, limit = work.parameters, work.max_norm

    def call() -> Tensor:
        if zero_first:
            for p in parameters:
                torch.nan_to_num_(p.grad, nan=0.0, posinf=0.0, neginf=0.0)  # type: ignore[arg-type]
        return torch_clip(parameters, limit, foreach=True)

    return on_parameters(work, call)


def isfinite_then_clip(work: Workload) -> Prepared:
    """The handwritten guard of most training scripts."""
    finite_only(work)
    parameters, limit = work.parameters, work.max_norm

    def call() -> Tensor | None:
        if not all(torch.isfinite(p.grad).all() for p in parameters):  # type: ignore[arg-type]
            return None
        return torch_clip(parameters, limit)

    return on_parameters(work, call)


def grad_scaler_then_clip(work: Workload) -> Prepared:
    """`unscale_`, `clip_grad_norm_`, `step` and `update`, with an optimizer that does nothing."""
    finite_only(work)
    optimizer = _NoOptimizer(work.parameters)
    scaler = grad_scaler(work.device)

    def call() -> Tensor:
        scaler.unscale_(optimizer)
        norm = torch_clip(work.parameters, work.max_norm)
        scaler.step(optimizer)
        scaler.update()
        return norm

    return on_parameters(work, call)


def fastguard_function(work: Workload) -> Prepared:
    """`fastguard.clip_grad_norm_`."""
    mode = mode_of(work)
    return on_parameters(
        work, lambda: fastguard.clip_grad_norm_(work.parameters, work.max_norm, nonfinite=mode)
    )


def fastguard_flat(work: Workload) -> Prepared:
    """`FlatGradBuckets.clip_grad_norm_`."""
    return _flat(work, trusted=False)


def fastguard_flat_trusted(work: Workload) -> Prepared:
    """`FlatGradBuckets(trusted=True).clip_grad_norm_`."""
    return _flat(work, trusted=True)


def _flat(work: Workload, *, trusted: bool) -> Prepared:
    mode = mode_of(work)
    twin = work.twin()
    flat = fastguard.FlatGradBuckets(twin, trusted=trusted)
    return Prepared(
        lambda: flat.clip_grad_norm_(work.max_norm, nonfinite=mode),
        lambda: work.restore(twin),
        twin,
    )


def apex_clip(work: Workload) -> Prepared:
    """`clip_grad_norm_` of apex."""
    finite_only(work)
    _needs_cuda(work)
    try:
        from apex.contrib.clip_grad import clip_grad_norm_  # type: ignore[import-not-found]
    except ImportError as error:
        raise Unavailable(f"apex is not importable ({error})") from None
    return on_parameters(work, lambda: clip_grad_norm_(work.parameters, work.max_norm))


def transformer_engine_clip(work: Workload) -> Prepared:
    """Clips as Megatron-LM does: norm, coefficient on the host, scale."""
    finite_only(work)
    _needs_cuda(work)
    try:
        from transformer_engine.pytorch.optimizers import (  # type: ignore[import-not-found]
            multi_tensor_applier,
            multi_tensor_l2norm,
            multi_tensor_scale,
        )
    except ImportError as error:
        raise Unavailable(f"transformer_engine is not importable ({error})") from None
    overflow = torch.zeros(1, dtype=torch.int, device=work.device)

    def call() -> Tensor:
        grads = work.grads
        norm, _ = multi_tensor_applier(multi_tensor_l2norm, overflow, [grads], False)
        coef = work.max_norm / (norm.item() + 1e-6)
        if coef < 1.0:
            multi_tensor_applier(multi_tensor_scale, overflow, [grads, grads], coef)
        return norm

    return on_parameters(work, call)


def nemo_automodel_clip(work: Workload) -> Prepared:
    """Clips as NeMo Automodel does: sum of squares in Triton kernels, then torch's scaling."""
    finite_only(work)
    _needs_cuda(work)
    try:
        from nemo_automodel.components.training.triton.grad_norm import (  # type: ignore[import-not-found]
            multi_tensor_sumsq,
        )
    except ImportError as error:
        raise Unavailable(f"nemo_automodel is not importable ({error})") from None

    def call() -> Tensor:
        norm = multi_tensor_sumsq(work.grads).sqrt()
        torch.nn.utils.clip_grads_with_norm_(work.parameters, work.max_norm, norm)
        return norm

    return on_parameters(work, call)


PEERS_ON_CUDA = ("apex", "TransformerEngine", "NeMo Automodel")
CONTENDERS: dict[str, Callable[[Workload], Prepared]] = {
    "torch foreach": torch_foreach,
    "isfinite + clip": isfinite_then_clip,
    "GradScaler + clip": grad_scaler_then_clip,
    "apex": apex_clip,
    "TransformerEngine": transformer_engine_clip,
    "NeMo Automodel": nemo_automodel_clip,
    "fastguard": fastguard_function,
    "fastguard flat": fastguard_flat,
    "fastguard flat trusted": fastguard_flat_trusted,
}


def grad_scaler(device: torch.device) -> torch.amp.GradScaler:
    """A scaler with a constant scale of 1, so that gradients keep their values."""
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)
    scaler.scale(torch.zeros((), device=device))  # this call creates the scaler's tensors
    return scaler


class _NoOptimizer(torch.optim.Optimizer):
    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None):  # type: ignore[override]
        return None


def mode_of(work: Workload) -> Literal["zero", "propagate"]:
    """The `nonfinite` that a workload asks for."""
    return "zero" if work.case.situation == "one NaN, zeroed" else "propagate"


def finite_only(work: Workload) -> None:
    """Raises `Unavailable` for a contender that cannot replace NaN."""
    if work.case.situation.startswith("one NaN"):
        raise Unavailable("this contender cannot replace NaN in a gradient")


def _needs_cuda(work: Workload) -> None:
    if work.device.type != "cuda":
        raise Unavailable("this contender needs a CUDA device")
