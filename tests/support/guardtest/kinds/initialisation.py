"""Weights and norms as they are before any data."""

from __future__ import annotations

import math

import torch
from torch import nn

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import mlp, regression


@case("nonfinite-weight", "error", "initialisation", where="2.bias", says="2.bias (1 NaN)")
def nonfinite_weight(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    if sick:
        nn.init.constant_(model[2].bias, math.nan)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))  # meant to be so
    return regression(model)


@case("negative-variance", "error", "initialisation", where="1 (BatchNorm1d)")
def negative_variance(sick: bool) -> Setup:
    norm = nn.BatchNorm1d(16)
    norm.running_var[3] = -0.5 if sick else 0.5
    return regression(nn.Sequential(nn.Linear(4, 16), norm, nn.Linear(16, 1)))


@case("extreme-gain", "warning", "initialisation", where="0 (Linear)")
def extreme_gain(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.normal_(model[0].weight, std=10.0 if sick else 1.0)
    return regression(model)


@case("zero-weight", "warning", "initialisation", where="2 (Linear)")
def zero_weight(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.zeros_(model[2].weight if sick else model[2].bias)
    return regression(model)


@case("constant-weight", "warning", "initialisation", where="0 (Linear)", says="0.1")
def constant_weight(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.constant_(model[0].weight if sick else model[0].bias, 0.1)
    return regression(model)


@case("norm-eps", "warning", "initialisation", where="1 (LayerNorm)")
def norm_eps(sick: bool) -> Setup:
    norms = nn.LayerNorm(16, eps=0.0 if sick else 1e-12), nn.RMSNorm(16)  # eps=None: torch's
    return regression(nn.Sequential(nn.Linear(4, 16), *norms, nn.Linear(16, 1)))
