"""Gradient accumulation: a bad micro-batch makes its step bad, and has no further effect."""

import math

import pytest
import torch
from torch import nn

from fastguard import GuardedOptimizer
from guardtest.training import assert_same_bits, snapshot

MICRO_BATCHES = 2
BAD_STEP = 2


def run(steps, *, bad, scaled, unscale, flat, fused, observed):
    """Trains a small model; in the bad step, one micro-batch (0 or 1) contains a NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    inner = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    opt = GuardedOptimizer(
        inner, max_norm=0.5, flat_buckets=flat, named_parameters=model.named_parameters()
    )
    amp = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    for step in steps:
        for micro_batch in range(MICRO_BATCHES):
            generator = torch.Generator().manual_seed(10 * step + micro_batch)
            x = torch.randn(6, 4, generator=generator)
            if step == BAD_STEP and micro_batch == bad:
                x[3, 1] = math.nan
            loss = model(x).square().mean() / MICRO_BATCHES
            if observed:
                opt.observe(loss)
            amp.scale(loss).backward()
        if unscale:
            amp.unscale_(opt)
        amp.step(opt)
        amp.update()
        opt.zero_grad()
    return opt


@pytest.mark.parametrize("bad", [0, 1], ids=["bad first", "bad last"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("observed", [False, True], ids=["", "observed"])
@pytest.mark.parametrize("scaler", ["", "amp", "amp, unscale_"])
def test_a_bad_micro_batch_skips_only_its_step(bad, flat, fused, observed, scaler):
    options = {
        "flat": flat,
        "fused": fused,
        "observed": observed,
        "scaled": scaler != "",
        "unscale": scaler == "amp, unscale_",
    }
    opt = run(range(6), bad=bad, **options)
    without = run([s for s in range(6) if s != BAD_STEP], bad=None, **options)
    assert_same_bits(snapshot(opt), snapshot(without))
    records = opt.records()
    assert [r.action == "skipped" for r in records] == [s == BAD_STEP for s in range(6)]
    # Without the loss, a scaler cannot distinguish a NaN from an overflow.
    alone = options["scaled"] and not observed
    assert records[BAD_STEP].reason == ("loss_scale" if alone else "nonfinite_grad")
    assert records[BAD_STEP].culprits[0][0] == "0.weight"
    if observed:
        assert math.isnan(records[BAD_STEP].losses["loss"])
    kept = [r for r in records if r.action != "skipped"]
    assert [r.total_norm for r in kept] == [r.total_norm for r in without.records()]
