"""A healthy run whose loss scaler searches its scale behaves as without the guard."""

from __future__ import annotations

import pytest
import torch

from guardtest import require
from guardtest.plain_loop import OPTIMIZERS, STEPS, batches, new_model
from guardtest.training import assert_same_bits, snapshot

OPTIONS = {"max_consecutive_skips": 1}  # an overflow does not count as a skip


def scaler():
    """A scaler whose first scales make the gradients overflow float16."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-4)


def with_accelerate(guarded):
    accelerate = require("accelerate")
    from fastguard.integrations.accelerate import guard

    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = scaler()  # Accelerate creates none on a CPU, but can use one
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    model = new_model()
    if guarded:
        guard(accelerator, model, **OPTIONS)
    inner = OPTIMIZERS["sgd"](model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(inner, 0.9)
    model, optimizer, schedule = accelerator.prepare(model, inner, schedule)
    for x in batches():
        accelerator.backward((model(x) - 1).square().mean())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer.optimizer, accelerator.scaler.get_scale(), schedule.get_last_lr()


def with_fabric(guarded):
    fabric_module = require("lightning.fabric")
    from lightning.fabric.plugins import MixedPrecision

    from fastguard.integrations.fabric import guard

    scaling = scaler()
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaling)]
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, plugins=plugins)
    model = new_model()
    if guarded:
        guard(fabric, model, **OPTIONS)
    model, optimizer = fabric.setup(model, OPTIMIZERS["sgd"](model.parameters()))
    for x in batches():
        fabric.backward((model(x) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer.optimizer, scaling.get_scale(), None


def with_lightning(guarded):
    lightning = require("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    from fastguard.integrations.lightning import GuardCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = new_model()

        def training_step(self, batch, batch_idx):
            return (self.net(batch) - 1).square().mean()

        def configure_optimizers(self):
            return OPTIMIZERS["sgd"](self.parameters())

    scaling = scaler()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaling)],
        callbacks=[GuardCallback(**OPTIONS)] if guarded else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    return module, trainer.optimizers[0], scaling.get_scale(), None


@pytest.mark.parametrize("run", [with_accelerate, with_fabric, with_lightning])
def test_overflows_of_a_scaler_that_searches_its_scale_are_not_incidents(run):
    model, optimizer, scale, lr = run(True)
    bare, inner, expected_scale, expected_lr = run(False)
    records = optimizer.records()
    overflows = [r for r in records if r.reason == "loss_scale"]
    assert 2 <= len(overflows) < STEPS and not any(r.is_incident for r in records)
    assert (scale, lr) == (expected_scale, expected_lr)
    # The running statistics are equal too, because all batches were good.
    assert_same_bits(dict(model.state_dict()), dict(bare.state_dict()))
    assert_same_bits(snapshot(optimizer), snapshot(inner))
