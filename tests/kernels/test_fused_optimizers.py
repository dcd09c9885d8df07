"""`fastguard.optim` in a guard: the update kernel gives the same bits as the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastguard.optim as fused
from fastguard import AGC, GuardedOptimizer
from fastguard.optim import cpu, triton
from guardtest.updates import same_bits

SHAPES = [(5, 7), (129,), ()]


def trained(update: Any, kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Returns weights and state after three steps: clipped, skipped and cleaned."""
    monkeypatch.setattr("fastguard.optim.backend.updater_for", lambda device: update)
    torch.manual_seed(0)
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    parameters = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    inner = kind(parameters, lr=1e-2, reproducible=True, **options)
    for mode, bad in (("skip", 1.0), ("skip", math.nan), ("zero", math.inf)):
        guard = GuardedOptimizer(inner, max_norm=1.0, clip_scope="tensor", nonfinite=mode)
        for p in parameters:
            p.grad = torch.randn_like(p)
        parameters[1].grad[3] = bad
        guard.step()
    state = [v for p in parameters for v in inner.state[p].values()]
    return [p.detach() for p in parameters] + state


def test_a_guard_with_limits_of_units_gives_the_same_records(monkeypatch):
    results = []
    for update in (triton.update, cpu.update):
        monkeypatch.setattr("fastguard.optim.backend.updater_for", lambda _, update=update: update)
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
        guard = GuardedOptimizer(
            fused.AdamW(parameters, lr=1e-2, reproducible=True), max_norm=AGC(), clip_scope="unit"
        )
        for bad in (1.0, math.nan, 1.0):
            for p in parameters:
                p.grad = torch.randn_like(p)
            parameters[1].grad[3] = bad
            guard.step()
        results.append((parameters, [(r.action, r.clip_coef) for r in guard.records()]))
    (ours, records), (theirs, others) = results
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert [action for action, _ in records] == ["clipped", "skipped", "clipped"]
    for (action, coef), other in zip(records, others, strict=True):
        assert (action, pytest.approx(coef, rel=1e-6)) == other


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (fused.AdamW, {}),
        (fused.AdamW, dict(dtype=torch.bfloat16, master="remainder")),
        (fused.AdamW, dict(dtype=torch.bfloat16, rounding="stochastic", seed=3)),
        (fused.AdamW, dict(update_clipping=True, momentum_reset=2, reset_warmup=1)),
        (fused.Adam, dict(weight_decay=0.1, amsgrad=True)),
        (fused.SGD, dict(momentum=0.9, dampening=0.3)),
        (fused.SGD, dict(momentum=0.9, nesterov=True)),
        (fused.Lion, dict(dtype=torch.bfloat16, master="float32")),
    ],
)
def test_a_guarded_run_gives_the_same_bits(kind, options, monkeypatch):
    ours = trained(triton.update, kind, options, monkeypatch)
    theirs = trained(cpu.update, kind, options, monkeypatch)
    assert all(map(same_bits, ours, theirs))
