"""`explain_nonfinite`: runs a bad batch again and names where its first NaN or Inf was born.

The replay has the same weights, the same batch and, if they are given, the same random numbers;
every operation is looked at, which makes it slow and, on a GPU, makes it wait after each. Until it
is called it costs nothing.
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
    """Finds the module, operation and tensor where the first non-finite value was born.

    The batch is run forward and, if the loss is finite, backward. Nothing is changed afterwards:
    parameters, buffers, gradients, random number generators, training flags and the batch are as
    before, bit for bit. The model runs in its present mode, compiled parts run eagerly, the hooks
    of an `ActivationGuard` are out of the way. For one process: DataParallel and
    DistributedDataParallel are unwrapped. Waits for a GPU.

    Args:
        model: The model, with the weights that it had before the bad step.
        batch: `(inputs, targets)`; or a mapping with just these two keys; or another mapping, the
            keyword arguments of the model. Inputs that are a tuple or a mapping are unpacked.
        loss_fn: The loss is `loss_fn(model(inputs), targets)`; of a mapping, `loss_fn(output,
            batch)`. None: it is the output's `loss`, and if it has none there is no backward pass.
        step: In place of `loss_fn`: `step(model, batch)` returns a loss; or a dict of parts whose
            sum is the loss; or a dict, an object or a tuple that has the loss in it, under `loss`
            or as its first entry.
        autocast: What the step ran under: `torch.autocast("cuda", torch.float16)` for example, or
            `"float16"` or `"bfloat16"`, on the model's device.
        rng: `fastguard.random_state()`, taken before the bad batch; dropout then falls as it
            did. None: as the generators stand now.
        loss_scale: What a GradScaler multiplied the loss by.

    Returns:
        A report whose text is a story with a remedy.

    Raises:
        TypeError: `batch` is of none of these kinds, both `loss_fn` and `step` are given, or an
            argument is of the wrong kind.
        ValueError: The model has no values yet: it is lazy, or on the meta device.
        Exception: What the model raises, after everything was put back.

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
