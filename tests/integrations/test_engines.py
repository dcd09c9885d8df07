"""Trainers that step through DeepSpeed are refused before its engine is created."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import nn

from guardtest import require
from guardtest.gloo_groups import group_of_one

lightning = require("lightning")

from lightning.fabric.strategies import SingleDeviceStrategy  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

from fastguard import GuardedOptimizer  # noqa: E402
from fastguard.integrations import fabric  # noqa: E402
from fastguard.integrations.lightning import GuardCallback  # noqa: E402

REFUSAL = "DeepSpeedStrategy takes the steps .* docs/recipes.md"


@pytest.fixture(autouse=True)
def environment():
    """Restores the environment: Lightning sets the rank of the process, which Accelerate reads."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def deepspeed(monkeypatch):
    """Makes both DeepSpeed strategies of Lightning constructible."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    module = require("deepspeed")
    # DeepSpeed compiles its collectives in shared memory at the first use, which takes minutes.
    monkeypatch.setitem(module.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    return module


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_with(strategy, monkeypatch):
    # The replaced methods only check for a GPU or for other processes.
    monkeypatch.setattr(strategy, "setup_environment", lambda: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        return lightning.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            max_epochs=1,
            callbacks=[GuardCallback(max_norm=1.0)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def test_a_trainer_with_deepspeed_is_refused(deepspeed, monkeypatch):
    trainer = trainer_with(lightning.pytorch.strategies.DeepSpeedStrategy(), monkeypatch)
    with pytest.raises(ValueError, match=REFUSAL):
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(3, 2, 4), batch_size=None))
    assert not trainer.strategy.optimizers  # the optimizers were not set up


class HPUDeepSpeedStrategy(DDPStrategy):
    """The DeepSpeed strategy of a vendor, which is recognized by its name."""


def test_a_trainer_with_a_vendors_deepspeed_is_refused(monkeypatch):
    trainer = trainer_with(HPUDeepSpeedStrategy(), monkeypatch)
    with pytest.raises(ValueError, match="HPUDeepSpeedStrategy takes the steps"):
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(3, 2, 4), batch_size=None))


def test_validation_with_deepspeed_is_not_refused(deepspeed, monkeypatch):
    trainer = trainer_with(lightning.pytorch.strategies.DeepSpeedStrategy(), monkeypatch)
    GuardCallback().setup(trainer, Module(), "validate")


def test_fabric_with_deepspeed_is_refused(deepspeed):
    strategy = lightning.fabric.strategies.DeepSpeedStrategy()
    mine = lightning.Fabric(accelerator="cpu", devices=1, strategy=strategy)
    with pytest.raises(ValueError, match=REFUSAL):
        fabric.guard(mine)
    assert "setup_optimizer" not in vars(strategy)  # the strategy was not changed


class LikeFSDP(SingleDeviceStrategy):
    """Returns the optimizers of a joint setup unchanged, as FSDPStrategy does on a GPU."""

    def setup_module_and_optimizers(self, module, optimizers, scheduler=None):
        return self.setup_module(module), optimizers, scheduler


def test_fabric_guards_an_optimizer_that_is_set_up_with_its_module():
    mine = lightning.Fabric(accelerator="cpu", strategy=LikeFSDP())
    model = nn.Linear(4, 1)
    fabric.guard(mine, model, nonfinite="zero")
    _, optimizer = mine.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(optimizer.optimizer, GuardedOptimizer)
    assert optimizer.optimizer.nonfinite == "zero"


def test_accelerate_with_deepspeed_is_refused(deepspeed, monkeypatch):
    accelerate = require("accelerate")
    from fastguard.integrations.accelerate import guard

    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with group_of_one():
        plugin = accelerate.DeepSpeedPlugin(zero_stage=0)
        accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
        with pytest.raises(ValueError, match="DEEPSPEED takes the steps"):
            guard(accelerator)
        assert accelerator.prepare_optimizer.__self__ is accelerator
