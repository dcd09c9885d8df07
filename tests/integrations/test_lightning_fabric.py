"""Plain loops with the real Lightning Fabric, with and without a guard."""

from __future__ import annotations

import math

import pytest
import torch

import fastguard
from guardtest import require
from guardtest.plain_loop import BAD, OPTIMIZERS, STEPS, batches, new_model
from guardtest.training import assert_same_bits, snapshot

fabric_module = require("lightning.fabric")

from fastguard.integrations.fabric import guard  # noqa: E402


class Run:
    """A plain Fabric loop, as in its documentation."""

    def __init__(self, optimizer="adamw-fused", *, guarded=True, options=None, precision=None):
        self.fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = new_model()
        inner = OPTIMIZERS[optimizer](model.parameters())
        if guarded:
            guard(self.fabric, model, **(options or {}))
        self.model, self.optimizer = self.fabric.setup(model, inner)
        self.norms = []

    def train(self, data, accumulate=1, **clip):
        for i, x in enumerate(data):
            loss = (self.model(x) - 1).square().mean()
            self.fabric.backward(loss)
            if (i + 1) % accumulate:
                continue
            if clip:
                norm = self.fabric.clip_gradients(self.model, self.optimizer, **clip)
                self.norms.append(None if norm is None else norm.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    @property
    def guarded(self):
        return self.optimizer.optimizer

    def final_state(self):
        return {**self.model.state_dict(), **snapshot(self.guarded)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [{"max_norm": 1e6}, {"clip_val": 1e6}, {}], ids=str)
def test_a_run_without_faults_matches_plain_fabric_bit_for_bit(optimizer, clip):
    own = Run(optimizer, guarded=False).train(batches(), **clip)
    ours = Run(optimizer).train(batches(), **clip)
    assert_same_bits(ours.final_state(), own.final_state())
    if "max_norm" in clip:
        assert ours.norms == pytest.approx(own.norms, rel=1e-6)


@pytest.mark.parametrize("clip", [{"max_norm": 0.01}, {"clip_val": 0.01}], ids=str)
def test_the_limit_of_clip_gradients_is_applied_once(clip):
    own = Run("sgd", guarded=False).train(batches(), **clip)
    ours = Run("sgd").train(batches(), **clip)
    for name, weight in own.final_state().items():
        torch.testing.assert_close(ours.final_state()[name], weight, rtol=3e-6, atol=1e-8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_with_bad_batches_ends_like_a_run_without_them(optimizer, precision):
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    poisoned, rest = batches(poisoned=BAD).to(dtype), batches(left_out=BAD).to(dtype)
    ours = Run(optimizer, precision=precision).train(poisoned, max_norm=0.5)
    without = Run(optimizer, precision=precision).train(rest, max_norm=0.5)
    assert_same_bits(ours.final_state(), without.final_state())
    assert {i for i, norm in enumerate(ours.norms) if math.isnan(norm)} == BAD


def test_fabrics_own_clipping_raises_on_nonfinite_norms():
    with pytest.raises(RuntimeError, match="non-finite"):
        Run(guarded=False).train(batches(poisoned=BAD), max_norm=0.5)


def test_the_guard_unscales_the_gradients_of_a_scaler():
    """Runs 16-mixed on a CPU, which needs the plugin of Fabric."""
    from lightning.fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    model = new_model()
    guard(fabric, model)
    model, optimizer = fabric.setup(model, OPTIMIZERS["adamw-fused"](model.parameters()))
    losses, norms = [], []
    for x in batches(poisoned=BAD):
        losses.append((model(x) - 1).square().mean())
        fabric.backward(losses[-1])
        norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    records = optimizer.records()
    assert {record.step - 1 for record in records if record.action == "skipped"} == BAD
    assert scaler.get_scale() == 2.0**10 / 2 ** len(BAD)
    for i, record in enumerate(records):
        if i not in BAD:
            assert norms[i] == pytest.approx(record.total_norm, rel=1e-6)
            assert record.losses["loss"] == pytest.approx(losses[i].item())
            assert record.total_norm < 100  # the norm is unscaled; the scale is 1024


def test_one_bad_micro_batch_skips_the_whole_accumulated_step():
    ours = Run().train(batches(poisoned={5}), accumulate=2, max_norm=0.5)
    without = Run().train(batches(left_out={4, 5}), accumulate=2, max_norm=0.5)
    assert_same_bits(ours.final_state(), without.final_state())
    losses = [record.losses["loss"] for record in ours.guarded.records()]
    assert [i for i, loss in enumerate(losses) if math.isnan(loss)] == [2]


def test_save_and_load_include_the_guard(tmp_path):
    data = batches(poisoned=BAD)
    whole = Run().train(data[:3])
    state = {"model": whole.model, "optimizer": whole.optimizer}
    whole.fabric.save(tmp_path / "state.ckpt", state)
    whole.train(data[3:])
    resumed = Run().train(data[:1])
    state = {"model": resumed.model, "optimizer": resumed.optimizer}
    resumed.fabric.load(tmp_path / "state.ckpt", state)
    resumed.train(data[3:])
    assert_same_bits(resumed.final_state(), whole.final_state())
    assert resumed.guarded.skipped_steps == len(BAD)


def test_a_guarded_schedule_counts_applied_steps_only():
    run = Run("sgd")
    schedule = fastguard.GuardedLR(
        torch.optim.lr_scheduler.ExponentialLR(run.guarded.optimizer, 0.5), optimizer=run.optimizer
    )
    for x in batches(poisoned=BAD):
        run.train([x])
        schedule.step()
    assert schedule.get_last_lr() == [0.5 * 0.5 ** (STEPS - len(BAD))]


def test_a_limit_of_the_guard_has_priority():
    run = Run("sgd", options={"max_norm": 0.25}).train(batches(), max_norm=1e-3)
    other = Run("sgd", options={"max_norm": 0.25}).train(batches())
    assert_same_bits(run.final_state(), other.final_state())


def test_model_and_optimizer_can_be_set_up_separately():
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model = new_model()
    guard(fabric, model, max_norm=1e-3)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(optimizer)
    fabric.backward(model(batches()[0]).sum())
    optimizer.step()
    (record,) = optimizer.records()
    assert record.action == "clipped"


def test_guarding_twice_is_refused():
    fabric = guard(fabric_module.Fabric(accelerator="cpu", devices=1))
    with pytest.raises(ValueError, match="already guarded"):
        guard(fabric)
