"""Calls every kernel a few times, for compute-sanitizer: python -m benchmarks.sanitize"""

from __future__ import annotations

import math

import torch

import fastguard
from fastguard.gradients.buckets import bucketize
from fastguard.stages.watch import count_exponents, read_bits


def main() -> None:
    """Runs all calls."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        sizes = (1, 7, 4097, 70_001)
        flat = torch.randn(sum(sizes) + 1, device="cuda").to(dtype)
        grads = list(flat[1:].split(sizes))  # neighboring tensors that are misaligned
        grads[1][-1] = math.nan
        parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        for norm_type in (2.0, math.inf, 3.0):
            fastguard.measure_grads(parameters, norm_type=norm_type, per_tensor=True)
            fastguard.clip_grad_norm_(parameters, 1.0, norm_type, nonfinite="zero")
        fastguard.clip_grad_norm_(parameters, 1.0)
        watched = bucketize(grads, segments=range(len(grads)), n_segments=len(grads))
        read_bits(watched, nonzero=True, checksum=True)
        count_exponents(watched, stride=3)
    guarded_steps()
    torch.cuda.synchronize()


def guarded_steps() -> None:
    """Takes good steps, a spike and a NaN, with rules, losses and records."""
    p = torch.nn.Parameter(torch.zeros(5000, device="cuda"))
    guarded = fastguard.GuardedOptimizer(
        torch.optim.AdamW([p], fused=True),
        max_norm=1.0,
        spike={
            "grad_norm": fastguard.SpikeRule(window=40, warmup=2, sigma=3.0),
            "loss": fastguard.Threshold(max=10.0),
        },
    )
    for scale in (1.0, 1.1, 0.9, 50.0, math.nan, 1.0):
        p.grad = torch.full_like(p, scale)
        guarded.step(loss=torch.ones((), device="cuda"))
    actions = [record.action for record in guarded.flush()]
    assert actions == ["clipped"] * 3 + ["skipped"] * 2 + ["clipped"], actions


if __name__ == "__main__":
    main()
