"""Adaptive gradient clipping in a guarded step: `max_norm=AGC(...)`, `clip_scope="unit"`."""

from __future__ import annotations

import torch

from fastguard.gradients.unit_buckets import refuse_shards, unit_buckets
from fastguard.guard.clip_scope import Layout
from fastguard.stages.agc import AGC, limited_positions
from fastguard.stages.contract import Signals, Verdict
from fastguard.stages.units import clip_units, with_units


class UnitClipping:
    """Clips the units of the parameters in a layout.

    Args:
        agc: The limits, and the excluded parameters.
        layout: The parameters and their names.

    Raises:
        TypeError: A parameter is a DTensor, or a shard of FSDP1 or DeepSpeed.
        ValueError: An entry of `agc.exclude` matches no parameter.
    """

    def __init__(self, agc: AGC, layout: Layout) -> None:
        refuse_shards(layout.parameters, layout.names)
        self._positions = limited_positions(layout.parameters, layout.names, agc.exclude)
        self._limits = torch.tensor([agc.clip_factor, agc.eps], dtype=torch.float64, device="cpu")

    def clip(
        self,
        layout: Layout,
        verdict: Verdict,
        signals: Signals,
        norm_type: float,
        propagates: bool,
    ) -> Verdict:
        """Scales the gradients unless the step is skipped; returns the verdict with `clip_coef`."""
        parameters = [layout.parameters[i] for i in self._positions]
        names = [layout.names[i] for i in self._positions]
        units = unit_buckets([p.grad for p in parameters], parameters, names, norm_type)
        smallest = clip_units(
            units,
            self._limits,
            norm_type,
            propagates=propagates,
            inv_scale=signals.inv_scale,
            verdict=verdict,
        )
        return with_units(verdict, smallest)
