"""`explain_nonfinite`: reruns a bad batch and finds the operation with the first NaN or Inf.

The replay uses the same weights, the same batch and, if given, the same random numbers. It checks
the result of every operation, which is slow and, on a GPU, needs a sync per operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastguard.diagnosis.activations import unguarded
from fastguard.diagnosis.provenance.report import NonFiniteReport as NonFiniteReport
from fastguard.diagnosis.provenance.search import Search
from fastguard.diagnosis.replay.arguments import (
    Autocast,
    check_batch_kind,
    check_functions,
    check_loss_scale,
    check_rng,
    checked_model,
    context_of,
)
from fastguard.diagnosis.replay.replay import Step, step_of
from fastguard.diagnosis.replay.restore import ModuleState
from fastguard.diagnosis.replay.tensor_range import TensorRange as TensorRange


def explain_nonfinite(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    step: Step | None = None,
    autocast: Autocast = None,
    rng: Mapping[str, Any] | None = None,
    loss_scale: float = 1.0,
) -> NonFiniteReport:
    """Finds the module, operation and tensor where the first non-finite value appeared.

    The batch is run forward and, if the loss is finite, backward. All state is restored afterward,
    bit for bit: parameters, buffers, gradients, random number generators, training flags and the
    batch. The model runs in its current mode, compiled parts run eagerly, and the hooks of an
    `ActivationGuard` are disabled. The function runs in one process (DataParallel and
    DistributedDataParallel are unwrapped), and synchronizes with the GPU.

    Args:
        model: The model, with its weights from before the bad step.
        batch: `(inputs, targets)`; a mapping with exactly the keys `"inputs"` and `"targets"`; or
            any other mapping, which is passed to the model as keyword arguments. A tuple or mapping
            of inputs is unpacked.
        loss_fn: Called as `loss_fn(model(inputs), targets)`, or as `loss_fn(output, batch)` if the
            batch is a mapping of keyword arguments. None: the loss is the output's `loss`; without
            a loss, there is no backward pass.
        step: Replaces `loss_fn`: `step(model, batch)` returns a loss, a dict of parts whose sum is
            the loss, or a dict, object or tuple that contains the loss under `loss` or as its first
            entry.
        autocast: The autocast used in the step: a context such as
            `torch.autocast("cuda", torch.float16)`, or `"float16"` or `"bfloat16"` for the model's
            device. None: no autocast.
        rng: The value of `fastguard.random_state()` from before the bad batch, so that dropout uses
            the same random numbers. None: the current state of the generators.
        loss_scale: The factor by which a GradScaler multiplied the loss. Default: 1.

    Returns:
        A report. Print it to see where and why the value appeared, and a remedy.

    Raises:
        TypeError: `batch` is of another kind, both `loss_fn` and `step` are given, or another
            argument has the wrong type.
        ValueError: The model has no values yet: it is lazy, or on the meta device.
        Exception: The model raised an error. All state is restored first.

    Example:
        >>> import torch, fastguard
        >>> class Unit(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x / x.norm(dim=1, keepdim=True)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), Unit())
        >>> batch = torch.zeros(2, 3), torch.ones(2, 3)
        >>> report = fastguard.explain_nonfinite(model, batch, torch.nn.functional.mse_loss)
        >>> report.origin, report.module, report.operation
        ('forward', '1 (Unit)', 'aten.div.Tensor')
        >>> report.evidence
        '2 of 2 denominators are exactly 0'
    """
    model = checked_model(model)
    check_functions(loss_fn, step)
    check_batch_kind(batch, any_kind=step is not None)
    check_rng(rng)
    check_loss_scale(loss_scale)
    context = context_of(autocast, model)
    roots = {"": model} | ({"loss_fn": loss_fn} if isinstance(loss_fn, nn.Module) else {})
    search = Search(roots, batch, step_of(loss_fn, step), context, rng, loss_scale)
    before = ModuleState(search.modules)
    try:
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"), unguarded():
            report = search.report()
            if not search.low_precision or not report.found or report.precision:
                return report
            before.restore()
            return search.with_precision(report)
    finally:
        before.restore()
