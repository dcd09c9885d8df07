"""Two processes under DistributedDataParallel: NaN on one of them, and both skip the same step.

Run it with `python ddp.py`, or with `torchrun --nproc-per-node 2 ddp.py`.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastguard


def train() -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
    opt = fastguard.GuardedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
        max_norm=1.0,
        group=fastguard.Replicated(dist.group.WORLD),  # every rank holds the same gradients
        named_parameters=model.named_parameters(),
    )
    torch.manual_seed(rank)  # each rank has its own data
    for step in range(20):
        inputs = torch.randn(4, 8)
        if step == 10 and rank == 1:
            inputs[0] = float("nan")
        loss = model(inputs).square().mean()
        loss.backward()
        opt.step(loss=loss, tag=step)
        opt.zero_grad()

    assert (opt.applied_steps, opt.skipped_steps) == (19, 1)
    weights = [torch.empty_like(model.module.weight) for _ in range(2)]
    dist.all_gather(weights, model.module.weight.detach())
    assert torch.equal(*weights) and weights[0].isfinite().all()
    if rank == 0:
        print("both ranks skipped step 11 and have the same weights")


def worker(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        train()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, (f"{folder}/store",), nprocs=2)
