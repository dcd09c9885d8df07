"""The update in two Triton launches, equivalent to `fastguard.optim.reference`.

    advance   launch 1, per tensor: step counts and coefficients
    update    launch 2, over a chunk table: see `fastguard.kernels.update`

Update clipping needs two more launches in between: see `fastguard.kernels.update_clipping`.
Statistics need one more launch at the end: see `fastguard.kernels.update_statistics`. With limits
of units, a few more launches find the most clipped unit. Units of more than `LONGEST_ROW` elements
need further launches, since their coefficients are computed before the update.

Nothing syncs with the device, and hyper-parameters are not constants of the kernels. Tensors that
are not dense, or whose strides differ from the weight's, are copied to buffers and back; after a
skipped step, the buffers are unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastguard.gradients.transfer import moved, numbers_on
from fastguard.gradients.unit_buckets import unit_buckets
from fastguard.kernels.chunks import is_dense
from fastguard.kernels.formulas import ALGORITHMS
from fastguard.kernels.update_launch import LONGEST_ROW, update_arrays, vector_size
from fastguard.kernels.update_table import Arrays
from fastguard.optim.contract import STATES, Update
from fastguard.stages.reference_units import summary_of
from fastguard.stages.triton import unit_coefs


def update(update: Update) -> Tensor | None:
    """Takes the step of one bucket, or changes nothing if it is skipped; see `reference.update`."""
    states = [update.states[n] for n in STATES[update.algorithm] if n in update.states]
    kept = [update.parameters, *states, *((update.masters,) if update.master else ())]
    (weights, *others), gradients, buffers = _alike(kept, update.grads)
    dtypes = tuple(state[0].dtype for state in states)
    parameter, gradient = update.parameters[0].dtype, update.grads[0].dtype
    units = _Units(update, weights, gradients)
    arrays = Arrays(
        weights=weights,
        gradients=gradients,
        states=others[: len(states)],
        masters=others[len(states)] if update.master else (),
        steps=update.steps,
        segment_ids=units.segment_ids,
        group_ids=update.group_ids,
        counters=update.counters,
        vector=vector_size(parameter, gradient, dtypes, update.master),
        rows=units.rows,
        long_rows=units.long_rows,
    )
    in_update = update_arrays(
        arrays,
        update.hyper.contiguous(),
        units.multiplier.contiguous(),
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
        limits=units.limits,
        propagates=units.propagates,
        statistics=update.statistics,
    )
    for tensor, buffer in buffers:
        tensor.copy_(buffer)  # the buffer is unchanged if the step was skipped
    # Increments versions, since autograd does not notice writes by a kernel.
    increment_version([t for tensors in kept for t in tensors] + list(update.steps))
    return units.summary(in_update)


class _Units:
    """How the kernel clips the units of an update.

    Args:
        update: The update.
        weights, gradients: The weights and gradients as the kernel reads them.

    Attributes:
        rows, long_rows: See `Arrays`.
        multiplier, segment_ids: As in the update, with one more segment for each long unit.
        limits, propagates: See `update_arrays`.
    """

    def __init__(
        self, update: Update, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        self.multiplier, self.segment_ids = update.multiplier, update.segment_ids
        self.rows: list[int] = []
        self.long_rows: list[int] = []
        self.limits, self.propagates = None, False
        self._long: list[Tensor] = []  # per tensor with long units, what was clipped
        self._found_inf = update.found_inf
        if update.units is None:
            return
        pairs = zip(weights, update.unit_counts, strict=True)
        sizes = [w.numel() // n if n else 0 for w, n in pairs]
        self.rows = [n if n <= LONGEST_ROW else 0 for n in sizes]
        self.long_rows = [n if n > LONGEST_ROW else 0 for n in sizes]
        self.propagates = update.units.propagates
        inv_scale = update.units.inv_scale
        numbers = update.units.numbers.tolist()
        if inv_scale is None:
            self.limits = numbers_on([*numbers, 1.0], update.device)
        else:
            inv_scale = moved(inv_scale.double().reshape(1), update.device)
            self.limits = torch.cat([numbers_on(numbers, update.device), inv_scale])
        if any(self.long_rows):
            self._add_segments(update, weights, gradients, inv_scale)

    def _add_segments(
        self,
        update: Update,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        inv_scale: Tensor | None,
    ) -> None:
        """Computes the coefficients of long units, which become multipliers."""
        assert update.units is not None
        long = [i for i, n in enumerate(self.long_rows) if n]
        (part,) = unit_buckets([gradients[i] for i in long], [weights[i] for i in long], None)
        numbers, propagates = update.units.numbers, update.units.propagates
        coefs = unit_coefs(part, numbers, 2.0, propagates, inv_scale)
        multipliers, self.segment_ids = [self.multiplier], list(update.segment_ids)
        end = self.multiplier.numel()
        for i, own in zip(long, coefs.split(part.counts), strict=True):
            multipliers.append(self.multiplier[self.segment_ids[i]] * own)
            self.segment_ids[i], end = end, end + len(own)
            values = summary_of(own)
            values[2] = float(i)
            self._long.append(values)
        self.multiplier = torch.cat(multipliers)

    def summary(self, in_update: Tensor | None) -> Tensor | None:
        """Returns what was clipped; see `reference.update`.

        Args:
            in_update: float64 `(n_programs, 4)`: what each program of the kernel clipped, see
                `update_arrays`; None: no limits of units.
        """
        if self.limits is None or in_update is None:
            return None
        rows = in_update
        if self._long:
            long = torch.stack(self._long)
            nothing = torch.zeros_like(long[:1])
            nothing[:, 0] = 1.0
            rows = torch.cat([rows, torch.where(self._found_inf != 0.0, nothing, long)])
        least = rows[:, 0].argmin()  # argmin gives the row with NaN, if there is one
        values = rows.index_select(0, least.reshape(1))[0]
        values[1] = rows[:, 1].sum()
        return values


def _alike(
    kept: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]
) -> tuple[Sequence[Sequence[Tensor]], Sequence[Tensor], list[tuple[Tensor, Tensor]]]:
    """Replaces tensors with buffers if their memory order differs from that of the weight.

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
