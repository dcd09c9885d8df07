"""Adaptive gradient clipping in a guarded step: `max_norm=AGC(...)`, `clip_scope="unit"`.

The optimizers of `fastguard.optim` clip units within their update, which computes the norms of a
unit just before it updates it. For all other optimizers, the gradients are clipped in place first.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastguard.gradients.unit_buckets import has_rows, refuse_shards, unit_buckets
from fastguard.guard.clip_scope import Layout
from fastguard.guard.in_update import InUpdate
from fastguard.guard.stepper import Stepper
from fastguard.stages.agc import AGC, UnitLimits, limited_positions
from fastguard.stages.contract import Signals, Verdict
from fastguard.stages.units import clip_units, with_units


class UnitClipping:
    """Clips the units of the parameters in a layout.

    Args:
        agc: The limits, and the excluded parameters.
        layout: The parameters and their names.
        norm_type: The norm of units.

    Raises:
        TypeError: A parameter is a DTensor, or a shard of FSDP1 or DeepSpeed.
        ValueError: An entry of `agc.exclude` matches no parameter.
    """

    def __init__(self, agc: AGC, layout: Layout, norm_type: float) -> None:
        refuse_shards(layout.parameters, layout.names)
        self._positions = limited_positions(layout.parameters, layout.names, agc.exclude)
        self._parameters = [layout.parameters[i] for i in self._positions]
        self._names = [layout.names[i] for i in self._positions]
        self._limited = [False] * len(layout.parameters)
        for i in self._positions:
            self._limited[i] = True
        self._limits = torch.tensor([agc.clip_factor, agc.eps], dtype=torch.float64, device="cpu")
        self._norm_type = norm_type

    def clip(
        self, verdict: Verdict, signals: Signals, propagates: bool, stepper: Stepper
    ) -> Verdict:
        """Scales the gradients unless the step is skipped, or passes the limits to the update.

        Returns:
            The verdict with the coefficients in `clip_coef`, or with the limits in `units`.
        """
        if self._is_in_update(stepper):
            limits = UnitLimits(self._limits, self._limited, propagates, signals.inv_scale)
            return replace(verdict, units=limits)
        grads = [p.grad for p in self._parameters]
        units = unit_buckets(grads, self._parameters, self._names, self._norm_type)
        clipped = clip_units(
            units,
            self._limits,
            self._norm_type,
            propagates=propagates,
            inv_scale=signals.inv_scale,
            verdict=verdict,
        )
        positions = self._positions
        return with_units(
            verdict,
            [s._replace(positions=[positions[i] for i in s.positions]) for s in clipped],
        )

    def _is_in_update(self, stepper: Stepper) -> bool:
        """Whether the update clips the units of these parameters.

        The memory layouts are checked in every step, since `p.data = ...` may change them
        unnoticed. The check takes 50 ns for a contiguous tensor.
        """
        parameters = self._parameters
        return (
            isinstance(stepper, InUpdate)
            and self._norm_type == 2.0
            and not any(group.get("update_clipping") for group in stepper.optimizer.param_groups)
            and (all(map(Tensor.is_contiguous, parameters)) or all(map(has_rows, parameters)))
        )
