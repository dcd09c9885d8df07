"""The update kernel on a GPU: bitwise results where documented, graphs, and no waiting."""

from dataclasses import replace

import pytest
import torch

from fastguard.optim import reference
from fastguard.optim import triton as triton_optim
from fastguard.optim.contract import STATES, Update
from fastguard.stages.agc import UnitLimits
from guardtest.graphs import captured

F32, BF16 = torch.float32, torch.bfloat16
SIZES = [1, 7, 4096, 4097, 65_537, 300_000]


def made(device, algorithm="adamw", dtypes=(F32, F32, F32), **options):
    """Returns the same numbers on every device."""
    torch.manual_seed(0)
    weight, gradient, state = dtypes
    n = len(SIZES)
    master, rounding = options.get("master"), options.get("rounding", "nearest")
    names = [name for name in STATES[algorithm] if name != "max_exp_avg_sq"]

    def several(dtype, scale=1.0):
        return [(torch.randn(size).abs() * scale).to(dtype).to(device) for size in SIZES]

    masters = {None: list, "float32": lambda: several(F32)}.get(
        master, lambda: [torch.randint(-(2**15), 2**15, (s,), dtype=torch.int16) for s in SIZES]
    )()
    # The last three values are the spike threshold, the steps between resets, and the warm-up.
    hyper = [[1e-3, 0.9, 0.999, 1e-8, 1e-2, 0.9, 0.1, 1.0, 5.0, 0.5, 4.0, 2.0]]
    hyper += [[3e-2, 0.8, 0.95, 1e-6, 0.0, 0.5, 0.0, -1.0, 11.0, 3.0, 0.0, 0.0]]
    return Update(
        algorithm=algorithm,
        parameters=several(weight),
        grads=several(gradient),
        states={name: several(state, 1e-2) for name in names},
        steps=[torch.tensor(float(9 * i), device=device) for i in range(n)],
        hyper=torch.tensor(hyper, dtype=torch.float64, device=device),
        group_ids=[i % 2 for i in range(n)],
        multiplier=torch.tensor([0.37, 1.0], dtype=torch.float64, device=device),
        segment_ids=[i % 2 for i in range(n)],
        found_inf=torch.zeros((), device=device),
        clean=torch.zeros((), device=device),
        masters=[m.to(device) for m in masters],
        counters=range(0, 1000 * n, 1000) if rounding == "stochastic" else (),
        **options,
    )


def written(one):
    lists = [one.parameters, *one.states.values(), one.masters, one.steps]
    return [tensor for tensors in lists for tensor in tensors]


@pytest.mark.parametrize("algorithm", ["adamw", "adam", "sgd", "lion"])
@pytest.mark.parametrize(
    "dtypes, options",
    [
        ((F32, F32, F32), {}),
        ((BF16, BF16, BF16), {}),
        ((BF16, BF16, BF16), {"rounding": "stochastic"}),
        ((BF16, BF16, F32), {"master": "float32"}),
        ((BF16, BF16, F32), {"master": "remainder"}),
    ],
    ids=["fp32", "bf16", "stochastic", "master", "remainder"],
)
def test_reproducible_updates_have_the_bits_of_the_cpu(algorithm, dtypes, options):
    here, there = (
        made(device, algorithm, dtypes, reproducible=True, **options) for device in ("cuda", "cpu")
    )
    for _ in range(3):
        triton_optim.update(here)
        reference.update(there)
    for ours, theirs in zip(written(here), written(there), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("update_clipping", [False, True])
def test_spikes_resets_and_update_clipping_have_the_bits_of_the_cpu(update_clipping, dtypes):
    options = {"spike_aware": True, "update_clipping": update_clipping, "reproducible": True}
    here, there = (made(device, dtypes=dtypes, **options) for device in ("cuda", "cpu"))
    for _ in range(3):
        triton_optim.update(here)
        reference.update(there)
    for ours, theirs in zip(written(here), written(there), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32)], ids=["fp32", "bf16"])
def test_units_are_clipped_as_on_the_cpu(dtypes):
    """Views the vectors as matrices with 1, 7, 16, 17, 1 and 6 rows, one of them with long rows."""
    rows = [1, 7, 16, 17, 1, 6]
    updates = []
    for device in ("cuda", "cpu"):
        one = made(device, dtypes=dtypes, reproducible=True)
        for tensors in (one.parameters, one.grads, *one.states.values()):
            tensors[:] = [t.view(n, -1) for t, n in zip(tensors, rows, strict=True)]
        limits = torch.tensor([0.9, 1e-3], dtype=torch.float64)
        updates.append(replace(one, units=UnitLimits(limits, ()), unit_counts=rows))
    here, there = updates
    smallest = triton_optim.update(here), reference.update(there)
    torch.testing.assert_close(smallest[0].cpu(), smallest[1], rtol=1e-7, atol=0)
    for ours, theirs in zip(written(here), written(there), strict=True):
        eps = 4 * torch.finfo(ours.dtype).eps  # the coefficient may differ by one rounding
        torch.testing.assert_close(ours.cpu(), theirs, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_updates_without_reproducible_are_as_accurate(dtype):
    here, there = (made(device, dtypes=(dtype,) * 3) for device in ("cuda", "cpu"))
    for _ in range(3):
        triton_optim.update(here)
        reference.update(there)
    rtol = 2e-2 if dtype is BF16 else 2e-6  # bfloat16: 2 ulps, which affect later steps
    for ours, theirs in zip(written(here), written(there), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("found_inf", [1.0, float("nan")])
def test_a_skipped_step_writes_nothing(found_inf):
    one = made("cuda")
    one.found_inf.fill_(found_inf)
    for grad in one.grads:
        grad.fill_(float("nan"))
    before = [t.clone() for t in written(one)]
    triton_optim.update(one)
    assert all(map(torch.equal, written(one), before))


def test_an_update_does_not_wait():
    one = made("cuda")
    triton_optim.update(one)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.grads[0] = one.grads[0].clone()  # causes another upload
        triton_optim.update(one)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_sees_new_hyper_parameters_and_verdicts():
    one, eager = made("cuda", reproducible=True), made("cuda", reproducible=True)
    triton_optim.update(one)
    triton_optim.update(eager)
    before = [t.clone() for t in written(one)]
    graph, _ = captured(lambda: triton_optim.update(one))
    for tensor, old in zip(written(one), before, strict=True):
        tensor.copy_(old)
    for lr, skip in ((1e-3, 0.0), (2e-3, 1.0), (5e-4, 0.0)):
        for each in (one, eager):
            each.hyper[:, 0] = lr
            each.found_inf.fill_(skip)
        graph.replay()
        triton_optim.update(eager)
    assert all(map(torch.equal, written(one), written(eager)))
