"""`fastguard.optim` in a guard on a GPU never waits and never writes a gradient."""

import math

import pytest
import torch

import fastguard.optim as fused
from fastguard import GuardedOptimizer

SIZES = [5, 4097, 70_000]
KINDS = [
    (fused.AdamW, torch.float32, {}),
    (fused.AdamW, torch.bfloat16, dict(master="remainder")),
    (fused.SGD, torch.float32, dict(momentum=0.9)),
    (fused.Lion, torch.bfloat16, dict(rounding="stochastic")),
]


def trained(kind, dtype, options, device):
    """Returns the weights after three steps, one of them skipped, and whether the steps waited."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n).to(dtype).to(device)) for n in SIZES]
    grads = [[torch.randn(n).to(dtype).to(device) for n in SIZES] for _ in range(4)]
    grads[1][1][7] = math.nan
    opt = GuardedOptimizer(kind(parameters, lr=1e-2, reproducible=True, **options), max_norm=1.0)
    for step, given in enumerate(grads):
        for p, g in zip(parameters, given, strict=True):
            p.grad = g.clone()
        torch.cuda.set_sync_debug_mode("error" if step and device == "cuda" else "default")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(
            torch.equal(p.grad.nan_to_num(), g.nan_to_num())
            for p, g in zip(parameters, given, strict=True)
        )
    assert opt.skipped_steps == 1
    return opt, [p.detach().cpu() for p in parameters]


@pytest.mark.parametrize("kind, dtype, options", KINDS)
def test_training_on_a_gpu_equals_a_cpu_and_does_not_wait(kind, dtype, options):
    opt, on_gpu = trained(kind, dtype, options, "cuda")
    assert opt.sync_free
    _, on_cpu = trained(kind, dtype, options, "cpu")
    close = (
        {"rtol": 2**-7, "atol": 2**-8} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    )
    for a, b in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(a, b, **close)


def watched_statistics(kind, dtype, options, device):
    """Returns the statistics of an applied step and of a skipped step."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n).to(dtype).to(device)) for n in SIZES]
    optimizer = kind(parameters, lr=1e-2, reproducible=True, **options)
    found = []
    for step in range(3):  # the first step uploads tables
        for p in parameters:
            p.grad = torch.randn(p.shape).to(dtype).to(device)
        optimizer.found_inf = torch.full((), float(step == 2), device=device)
        torch.cuda.set_sync_debug_mode("error" if step and device == "cuda" else "default")
        try:
            with optimizer.collecting_statistics() as statistics:
                optimizer.step()
            found.append((statistics.weight_norms, statistics.update_norms))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


@pytest.mark.parametrize("kind, dtype, options", KINDS)
def test_the_statistics_on_a_gpu_equal_those_on_a_cpu(kind, dtype, options):
    on_gpu = watched_statistics(kind, dtype, options, "cuda")
    on_cpu = watched_statistics(kind, dtype, options, "cpu")
    for ours, theirs in zip(on_gpu[:2], on_cpu[:2], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2e-2, atol=0)
    assert not any(norms.any() for norms in on_gpu[2])  # skipped


def test_another_backend_is_not_used_silently():
    from fastguard.optim import triton
    from fastguard.optim.backend import updater_for

    assert updater_for(torch.device("cuda")) is triton.update
