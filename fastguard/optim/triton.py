"""The update in two Triton launches, equivalent to `fastguard.optim.reference`.

    advance   launch 1, per tensor: step counts and coefficients
    update    launch 2, over a chunk table: see `fastguard.kernels.update`

Update clipping needs two more between them: see `fastguard.kernels.update_clipping`.

Nothing syncs with the device, and hyper-parameters are not constants of the kernels. Tensors that
are not dense, or whose strides differ from the weight's, are copied to buffers and back; after a
skipped step, the buffers are unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastguard.kernels.chunks import is_dense
from fastguard.kernels.formulas import ALGORITHMS
from fastguard.kernels.update import update_arrays, vector_size
from fastguard.kernels.update_table import Arrays
from fastguard.optim.contract import STATES, Update


def update(update: Update) -> None:
    """Takes the step of one bucket, or changes nothing if it is skipped; see `reference.update`."""
    states = [update.states[n] for n in STATES[update.algorithm] if n in update.states]
    kept = [update.parameters, *states, *((update.masters,) if update.master else ())]
    (weights, *others), gradients, buffers = _alike(kept, update.grads)
    dtypes = tuple(state[0].dtype for state in states)
    parameter, gradient = update.parameters[0].dtype, update.grads[0].dtype
    arrays = Arrays(
        weights=weights,
        gradients=gradients,
        states=others[: len(states)],
        masters=others[len(states)] if update.master else (),
        steps=update.steps,
        segment_ids=update.segment_ids,
        group_ids=update.group_ids,
        counters=update.counters,
        vector=vector_size(parameter, gradient, dtypes, update.master),
    )
    update_arrays(
        arrays,
        update.hyper.contiguous(),
        update.multiplier.contiguous(),
        update.clean,
        update.found_inf,
        algorithm=ALGORITHMS[update.algorithm],
        master=update.master,
        stochastic=update.rounding == "stochastic",
        amsgrad=update.amsgrad,
        nesterov=update.nesterov,
        reproducible=update.reproducible,
        spike_aware=update.spike_aware,
        update_clipping=update.update_clipping,
    )
    for tensor, buffer in buffers:
        tensor.copy_(buffer)  # unchanged if the step was skipped
    # Autograd does not notice writes by a kernel.
    increment_version([t for tensors in kept for t in tensors] + list(update.steps))


def _alike(
    kept: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]
) -> tuple[Sequence[Sequence[Tensor]], Sequence[Tensor], list[tuple[Tensor, Tensor]]]:
    """Replaces tensors whose elements lie in another order than the weight's by buffers.

    Returns:
        `kept` and `grads` with buffers, and the `(tensor, buffer)` pairs of `kept`.
    """
    if all(all(map(Tensor.is_contiguous, tensors)) for tensors in (*kept, grads)):
        return list(kept), grads, []
    written: list[tuple[Tensor, Tensor]] = []
    all_lists = [list(tensors) for tensors in (*kept, grads)]
    for i, weight in enumerate(kept[0]):
        like = weight
        if not is_dense(weight):
            like = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for number, tensors in enumerate(all_lists):
            tensor = tensors[i]
            if is_dense(tensor) and tensor.stride() == like.stride():
                continue
            buffer = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            tensors[i] = buffer
            if number < len(kept):
                written.append((tensor, buffer))
    return all_lists[:-1], all_lists[-1], written
