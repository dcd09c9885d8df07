"""Trainers in fp16 with a real scaler, which they do not use on a CPU."""

import math

import pytest
import torch
from torch import nn

from guardtest import require

STEPS = 8
BAD = {1, 4}


def batches(poisoned=()):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS, 6, 8, generator=generator)
    for i in poisoned:
        x[i, 2, 1] = math.nan
    return x


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    require("accelerate")  # the Trainer of transformers needs it
    return require("transformers")


def in_order(transformers):
    """Keeps the order of the batches, in versions with and without an argument for this."""

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def test_the_trainer_of_transformers_in_fp16(transformers, tmp_path):
    from fastguard.integrations.huggingface import guard

    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    labels = torch.arange(6)
    trainer = in_order(transformers)(
        model=transformers.LlamaForCausalLM(config),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            num_train_epochs=1,
            lr_scheduler_type="inverse_sqrt",
            warmup_steps=2,
            fp16=True,
            max_grad_norm=0.5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=[{"inputs_embeds": x, "labels": labels} for x in batches(BAD)],
    )
    callback = guard(trainer)
    trainer.train()
    scaler = trainer.accelerator.scaler
    records = callback.optimizer.flush()
    skipped = {record.step - 1 for record in records if record.action == "skipped"}
    assert skipped >= BAD  # the first scale may also overflow without a bad batch
    assert scaler.get_scale() == scaler._init_scale / 2 ** len(skipped)
    assert trainer.lr_scheduler.last_epoch == STEPS - len(skipped)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["skipped_steps"] == len(skipped)
    for i in set(range(STEPS)) - skipped:
        assert logged[i]["grad_norm"] == pytest.approx(records[i].total_norm, rel=1e-6)


def test_lightning_in_16_mixed():
    lightning = require("lightning")
    from fastguard.integrations.lightning import GuardCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, fused=True)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    callback = GuardCallback()
    trainer = lightning.Trainer(
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        gradient_clip_val=0.5,
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(batches(BAD), batch_size=None))
    records = callback.optimizers[0].flush()
    skipped = {record.step - 1 for record in records if record.action == "skipped"}
    scaler = trainer.precision_plugin.scaler
    assert skipped >= BAD
    assert scaler.get_scale() == scaler._init_scale / 2 ** len(skipped)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == STEPS - len(skipped)
    assert trainer.callback_metrics["train/skipped_steps"] == len(skipped)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert all(record.total_norm < 1e3 for record in records)  # unscaled: the scale is 65536


def test_an_accelerate_loop_in_fp16():
    accelerate = require("accelerate")
    from fastguard.integrations.accelerate import guard

    accelerator = accelerate.Accelerator(mixed_precision="fp16")
    model = nn.Linear(8, 1)
    guard(accelerator, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    skipped = set()
    for i, x in enumerate(batches(BAD).to(accelerator.device)):
        accelerator.backward(model(x).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if optimizer.step_was_skipped:
            skipped.add(i)
    assert skipped >= BAD
    assert accelerator.scaler.get_scale() == accelerator.scaler._init_scale / 2 ** len(skipped)
    assert schedule.scheduler.last_epoch == STEPS - len(skipped)
    assert all(torch.isfinite(p).all() for p in model.parameters())
