"""Two DDP processes in each framework: if one rank has NaN, both skip."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastguard import read_records
from guardtest import require
from guardtest.ranks import Ranks
from guardtest.torchvision_ops import define_missing_operators
from guardtest.training import assert_same_bits

pytestmark = pytest.mark.slow  # each process imports its framework

STEPS = 6
BAD = {1, 4}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def batches(poison):
    """Batches that differ by rank. Those in `BAD` are NaN on rank 1, or left out on both ranks."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(STEPS, 6, 4, generator=generator)
    if not poison:
        return x[[i for i in range(STEPS) if i not in BAD]]
    if dist.get_rank() == 1:
        for i in BAD:
            x[i, 2, 1] = math.nan
    return x


def set_torchrun_environment():
    """Sets the environment of torchrun, and repeats the preparation of conftest.py."""
    define_missing_operators()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "12910")
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    os.environ["GROUP_RANK"] = "0"
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())


def with_accelerate(poison, records):
    set_torchrun_environment()
    import accelerate

    from fastguard.integrations.accelerate import guard

    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.distributed_type == accelerate.DistributedType.MULTI_CPU
    model = new_model()
    guard(accelerator, model, records=records)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    for x in batches(poison):
        accelerator.backward((model(x) - 1).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model.module.state_dict(), summary(optimizer.optimizer)


def with_fabric(poison, records):
    set_torchrun_environment()
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    from fastguard.integrations.fabric import guard

    strategy = DDPStrategy(process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = new_model()
    guard(fabric, model, records=records)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    for x in batches(poison):
        fabric.backward((model(x) - 1).square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model.module.state_dict(), summary(optimizer.optimizer)


def with_lightning(poison, records):
    set_torchrun_environment()
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    from fastguard.integrations.lightning import GuardCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = new_model()

        def training_step(self, batch, batch_idx):
            return (self.net(batch) - 1).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    callback = GuardCallback(records=records)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        max_epochs=1,
        gradient_clip_val=0.5,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(batches(poison), batch_size=None))
    return module.net.state_dict(), summary(callback.optimizers[0])


def summary(optimizer):
    records = optimizer.records()
    skipped = {record.step - 1 for record in records if record.action == "skipped"}
    return skipped, [record.losses["loss"] for record in records]


@pytest.mark.parametrize(
    "framework, run",
    [("accelerate", with_accelerate), ("lightning", with_fabric), ("lightning", with_lightning)],
    ids=["accelerate", "fabric", "lightning"],
)
def test_all_ranks_skip_if_one_of_them_has_nan(two, tmp_path, framework, run):
    require(framework)
    path = tmp_path / "records.jsonl"
    (ours, summary_0), (other, summary_1) = two.run(run, True, path)
    without = two.run(run, False, None)[0][0]
    assert summary_0[0] == summary_1[0] == BAD
    assert str(summary_0[1]) == str(summary_1[1])  # reduced losses are equal on both ranks
    assert_same_bits(dict(ours), dict(other))
    assert_same_bits(dict(ours), dict(without))
    records = list(read_records(path, strict=True))  # one rank writes
    assert [r.tag["global_step"] for r in records] == [*range(1, STEPS + 1)]
    assert {r.step - 1 for r in records if r.culprit_ranks == 2} == BAD  # DDP has spread the NaN
