"""A few small calls of every kernel, for compute-sanitizer: python -m benchmarks.sanitize"""

from __future__ import annotations

import math

import torch

import fastguard


def main() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        sizes = (1, 7, 4097, 70_001)
        flat = torch.randn(sum(sizes) + 1, device="cuda").to(dtype)
        grads = list(flat[1:].split(sizes))  # misaligned neighbours
        grads[1][-1] = math.nan
        parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        for norm_type in (2.0, math.inf, 3.0):
            fastguard.measure_grads(parameters, norm_type=norm_type, per_tensor=True)
            fastguard.clip_grad_norm_(parameters, 1.0, norm_type, nonfinite="zero")
        fastguard.clip_grad_norm_(parameters, 1.0)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
