"""Weights and normalization layers before training."""

from __future__ import annotations

import math

import torch
from torch import nn

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import mlp, regression


@case("nonfinite-weight", "error", "initialization", where="2.bias", says="2.bias (1 NaN)")
def nonfinite_weight(faulty: bool) -> Setup:
    model = mlp(4, 16, 1)
    if faulty:
        nn.init.constant_(model[2].bias, math.nan)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))  # intended
    return regression(model)


@case("negative-variance", "error", "initialization", where="1 (BatchNorm1d)")
def negative_variance(faulty: bool) -> Setup:
    norm = nn.BatchNorm1d(16)
    norm.running_var[3] = -0.5 if faulty else 0.5
    return regression(nn.Sequential(nn.Linear(4, 16), norm, nn.Linear(16, 1)))


@case("extreme-gain", "warning", "initialization", where="0 (Linear)")
def extreme_gain(faulty: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.normal_(model[0].weight, std=10.0 if faulty else 1.0)
    return regression(model)


@case("zero-weight", "warning", "initialization", where="2 (Linear)")
def zero_weight(faulty: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.zeros_(model[2].weight if faulty else model[2].bias)
    return regression(model)


@case("constant-weight", "warning", "initialization", where="0 (Linear)", says="0.1")
def constant_weight(faulty: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.constant_(model[0].weight if faulty else model[0].bias, 0.1)
    return regression(model)


@case("norm-eps", "warning", "initialization", where="1 (LayerNorm)")
def norm_eps(faulty: bool) -> Setup:
    norms = (
        nn.LayerNorm(16, eps=0.0 if faulty else 1e-12),
        nn.RMSNorm(16),
    )  # RMSNorm: eps=None is torch's default
    return regression(nn.Sequential(nn.Linear(4, 16), *norms, nn.Linear(16, 1)))
