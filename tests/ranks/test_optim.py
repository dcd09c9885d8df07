"""`fastguard.optim` on the local shards of FSDP2."""

from __future__ import annotations

import pytest
import torch

from guardtest.rank_guards import a_model


def trained(sharded: bool, master: str | None) -> list[list[float]]:
    """Returns the weights after three clipped steps and a skipped one, with equal batches."""
    import fastguard.optim
    from fastguard import GuardedOptimizer

    dtype = torch.float32 if master is None else torch.bfloat16
    model = a_model().to(dtype)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        for module in model:
            for name, p in list(module.named_parameters(recurse=False)):
                shard = distribute_tensor(p.detach(), mesh, [Shard(0)])
                setattr(module, name, torch.nn.Parameter(shard))
    inner = fastguard.optim.AdamW(model.parameters(), lr=1e-2, master=master, reproducible=True)
    opt = GuardedOptimizer(inner, max_norm=0.5)
    for step in range(4):
        for i, p in enumerate(model.parameters()):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step * 10 + i))
            grad = grad.to(dtype)
            if step == 1 and i == 1:
                grad[0] = float("nan")
            p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if sharded else grad
        opt.step()
    assert opt.skipped_steps == 1
    for p in model.parameters():
        assert all(type(v) is type(p.data) for k, v in inner.state[p].items() if k != "step")
    whole = [p.full_tensor() if sharded else p for p in model.parameters()]
    return [p.detach().flatten().tolist() for p in whole]


@pytest.mark.parametrize("master", [None, "float32", "remainder"])
def test_sharded_training_equals_training_of_the_whole_model(two, master):
    alone = trained(False, master)
    for weights in two.run(trained, True, master):
        for mine, theirs in zip(weights, alone, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-2 if master else 1e-5, abs=1e-6)


def watched_shards() -> dict[str, list[float]]:
    """Returns the recorded and the true statistics of a shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import fastguard.optim
    from fastguard import GuardedOptimizer

    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(distribute_tensor(torch.arange(1.0, 9.0), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
    old = p.detach().to_local().clone()
    inner = fastguard.optim.AdamW([p], lr=1e-2)
    opt = GuardedOptimizer(inner, named_parameters=[("w", p)], watch=("update_ratio",))
    opt.step()
    [record] = opt.flush()
    change = (p.detach().to_local() - old).norm()
    told = record.watch
    return {
        "recorded": [told["weight_norm"]["w"], told["update_ratio"]["w"]],
        "true": [old.norm().item(), (change / old.norm()).item()],
    }


def test_each_rank_records_the_update_of_its_own_shard(two):
    first, second = two.run(watched_shards)
    for rank in (first, second):
        assert rank["recorded"] == pytest.approx(rank["true"], rel=1e-4)
    assert first["recorded"] != second["recorded"]
