"""Many guarded steps with changing addresses, missing gradients and bad values."""

import math
import os
import time

import pytest
import torch

from fastguard import GuardedOptimizer, SpikeRule
from guardtest.tolerances import NORM_RTOL

SECONDS = float(os.environ.get("FASTGUARD_SOAK_SECONDS", "120"))
SIZES = [0, 1, 7, 8, 4095, 4096, 4097, 65536, 65537, 300_000]
CHECKED = 50  # steps between comparisons, which wait for the device
WARM = 500  # steps after which memory no longer grows


class Run:
    """One guard and its gradients; the norm is always far above its limit of 1."""

    def __init__(self, mode):
        self.mode, self.steps, self.bad = mode, 0, 0
        self.parameters = [torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in SIZES]
        inner = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)
        rule = SpikeRule(window=64, sigma=50.0, action="record")
        self.opt = GuardedOptimizer(inner, max_norm=1.0, nonfinite=mode, spike=rule)
        self.loss = torch.ones((), device="cuda")

    def step(self, picked, poisoned, check):
        for p in self.parameters:
            p.grad = None
        for i in picked:
            self.parameters[i].grad = torch.randn(SIZES[i], device="cuda")
        largest = max(picked, key=SIZES.__getitem__)
        if poisoned:
            self.parameters[largest].grad[-1] = math.nan
        self.steps += 1
        self.bad += poisoned
        before = [self.parameters[i].grad.clone() for i in picked] if check else []
        self.opt.step(loss=self.loss if self.steps % 2 else 1.0)
        if check:
            self.compare(picked, before, largest if poisoned else None)
        else:
            self.opt.records()

    def compare(self, picked, before, culprit):
        finite = torch.cat([g[g.isfinite()] for g in before]).double()
        skipped = culprit is not None and self.mode == "skip"
        record = self.opt.flush()[-1]
        assert record.total_norm == pytest.approx(finite.norm().item(), rel=NORM_RTOL)
        assert record.action == (
            "skipped" if skipped else "clipped" if culprit is None else "sanitized"
        )
        assert (record.step, record.nan) == (self.steps, int(culprit is not None))
        assert [c[0] for c in record.culprits] == (
            [] if culprit is None else [f"parameter {culprit}"]
        )
        coef = self.opt.last.clip_coef.float()
        for i, g in zip(picked, before, strict=True):
            want = g if skipped else torch.where(g.isfinite(), g, 0.0) * coef
            grad = self.parameters[i].grad
            torch.testing.assert_close(grad, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 100)
def test_soak():
    """Takes guarded steps for two minutes, or for FASTGUARD_SOAK_SECONDS."""
    generator = torch.Generator().manual_seed(5)
    runs = [Run("skip"), Run("zero")]
    end = time.monotonic() + SECONDS
    steps, peak = 0, None
    while time.monotonic() < end:
        picked = torch.randperm(len(SIZES), generator=generator)[:6].tolist()
        check = steps // 2 % CHECKED == 0
        runs[steps % 2].step(picked, poisoned=steps // 2 % 3 == 0, check=check)
        steps += 1
        if steps == WARM:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            peak = torch.cuda.memory_allocated() + 2**25
    assert peak is None or torch.cuda.max_memory_allocated() <= peak
    for run in runs:
        assert all(p.isfinite().all() for p in run.parameters)
        skipped = run.bad if run.mode == "skip" else 0
        assert (run.opt.skipped_steps, run.opt.applied_steps) == (skipped, run.steps - skipped)
    print(f"{steps} steps in {SECONDS:g} s")
