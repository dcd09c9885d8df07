"""Plain loops with the real Accelerate, with and without a guard."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastguard import GuardedOptimizer
from guardtest import require
from guardtest.plain_loop import BAD, OPTIMIZERS, STEPS, batches, new_model
from guardtest.training import assert_same_bits, snapshot

accelerate = require("accelerate")

from fastguard.integrations.accelerate import guard  # noqa: E402


class Run:
    """A plain Accelerate loop, as in its documentation."""

    def __init__(self, optimizer="adamw-fused", *, guarded=True, options=None, **accelerator):
        self.accelerator = accelerate.Accelerator(cpu=True, **accelerator)
        model = new_model()
        if guarded:
            guard(self.accelerator, model, **(options or {}))
        inner = OPTIMIZERS[optimizer](model.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(inner, 0.9)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, inner, schedule)
        self.norms = []

    def train(self, data, max_norm=0.5):
        for x in data:
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - 1).square().mean()
                self.accelerator.backward(loss)
                if max_norm is not None and self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
                    self.norms.append(norm.item())
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self

    def final_state(self):
        return {
            **self.model.state_dict(),
            **snapshot(self.optimizer),
            "lr": self.schedule.get_last_lr(),
        }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [1e6, None], ids=str)
def test_a_run_without_faults_matches_plain_accelerate_bit_for_bit(optimizer, max_norm):
    own = Run(optimizer, guarded=False).train(batches(), max_norm)
    ours = Run(optimizer).train(batches(), max_norm)
    assert_same_bits(ours.final_state(), own.final_state())
    assert ours.norms == pytest.approx(own.norms, rel=1e-6)


def test_the_limit_of_clip_grad_norm_is_applied_once():
    own = Run("sgd", guarded=False).train(batches(), 0.01)
    ours = Run("sgd").train(batches(), 0.01)
    for name, weight in own.final_state().items():
        torch.testing.assert_close(ours.final_state()[name], weight, rtol=3e-6, atol=1e-8)
    records = ours.optimizer.optimizer.records()
    assert [record.total_norm for record in records] == pytest.approx(ours.norms, rel=1e-6)
    assert all(record.action == "clipped" for record in records)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_with_bad_batches_ends_like_a_run_without_them(optimizer, precision):
    ours = Run(optimizer, mixed_precision=precision).train(batches(poisoned=BAD))
    without = Run(optimizer, mixed_precision=precision).train(batches(left_out=BAD))
    assert_same_bits(ours.final_state(), without.final_state())
    assert {i for i, norm in enumerate(ours.norms) if math.isnan(norm)} == BAD


def test_one_bad_micro_batch_skips_the_whole_accumulated_step():
    ours = Run(gradient_accumulation_steps=2).train(batches(poisoned={5}))
    without = Run(gradient_accumulation_steps=2).train(batches(left_out={4, 5}))
    assert_same_bits(ours.final_state(), without.final_state())
    assert ours.optimizer.optimizer.steps_taken == STEPS // 2


def test_accelerate_reports_which_steps_were_skipped():
    run, skipped = Run(), []
    for x in batches(poisoned=BAD):
        run.train([x])
        assert run.accelerator.optimizer_step_was_skipped == run.optimizer.step_was_skipped
        skipped.append(run.optimizer.step_was_skipped)
    assert {i for i, was in enumerate(skipped) if was} == BAD


def test_the_guard_unscales_the_gradients_of_a_scaler():
    """Accelerate refuses to set up fp16 on a CPU, but can run it."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    model = new_model()
    guard(accelerator, model)
    inner = OPTIMIZERS["adamw-fused"](model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
    model, optimizer, schedule = accelerator.prepare(model, inner, schedule)
    losses, norms = [], []
    for i, x in enumerate(batches(poisoned=BAD)):
        losses.append((model(x) - 1).square().mean())
        accelerator.backward(losses[-1])
        norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        assert optimizer.step_was_skipped == (i in BAD)
        schedule.step()
        optimizer.zero_grad()
    records = optimizer.optimizer.records()
    assert accelerator.scaler.get_scale() == 2.0**10 / 2 ** len(BAD)
    assert schedule.get_last_lr() == [0.05 * 0.5 ** (STEPS - len(BAD))]
    for i in set(range(STEPS)) - BAD:
        assert norms[i] == pytest.approx(records[i].total_norm, rel=1e-6)
        assert records[i].losses["loss"] == pytest.approx(losses[i].item())
        assert records[i].total_norm < 100  # the norm is unscaled; the scale is 1024


def test_save_state_and_load_state_include_the_guard(tmp_path):
    data = batches(poisoned=BAD)
    whole = Run().train(data[:3])
    whole.accelerator.save_state(str(tmp_path))
    whole.train(data[3:])
    resumed = Run().train(data[:1])
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(data[3:])
    assert_same_bits(resumed.final_state(), whole.final_state())
    assert resumed.optimizer.optimizer.skipped_steps == len(BAD)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("flat", [True, "trusted"])
def test_flat_parameters_are_saved_and_loaded(tmp_path, flat, safe):
    """Accelerate drops tensors that share memory when it writes safetensors."""
    options = {"flat_parameters": flat, "nonfinite": "skip"}
    data = batches(poisoned=BAD)
    whole = Run(options=options).train(data[:3])
    whole.accelerator.save_state(str(tmp_path / "state"), safe_serialization=safe)
    whole.accelerator.save_model(whole.model, str(tmp_path / "model"), safe_serialization=safe)
    saved = {name: value.clone() for name, value in whole.model.state_dict().items()}
    (file,) = [*(tmp_path / "model").iterdir()]
    loaded = load_file(file) if safe else torch.load(file)
    assert_same_bits({name: loaded[name] for name in saved}, saved)
    whole.train(data[3:])
    resumed = Run(options=options).train(data[:1])
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert_same_bits(dict(resumed.model.state_dict()), saved)
    resumed.train(data[3:])
    assert_same_bits(resumed.final_state(), whole.final_state())
    memory = {p.untyped_storage().data_ptr() for p in resumed.model.parameters()}
    assert len(memory) == 1


def test_a_skip_after_a_load_restores_the_loaded_running_statistics(tmp_path):
    whole = Run().train(batches())
    whole.accelerator.save_state(str(tmp_path))
    resumed = Run()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(batches(poisoned={0})[:1])
    assert_same_bits(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_the_guard_receives_the_mean_loss_of_a_step():
    run = Run(gradient_accumulation_steps=2, options={"nonfinite": "skip"})
    data = batches()
    with torch.no_grad():  # before the first update, in training mode as in the loop
        expected = [(new_model()(x) - 1).square().mean().item() for x in data[:2]]
    run.train(data[:2])
    (record,) = run.optimizer.optimizer.records()
    assert record.losses["loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_a_limit_of_the_guard_has_priority():
    run = Run("sgd", options={"max_norm": 0.25}).train(batches(), max_norm=1e-3)
    other = Run("sgd", options={"max_norm": 0.25}).train(batches(), max_norm=None)
    assert_same_bits(run.final_state(), other.final_state())


def test_a_requested_limit_applies_to_one_step():
    run = Run("sgd").train(batches()[:1], max_norm=1e-3).train(batches()[1:2], max_norm=None)
    assert [r.action for r in run.optimizer.optimizer.records()] == ["clipped", "applied"]


def test_accelerate_itself_clips_a_part_of_the_model():
    run = Run("sgd", options={"nonfinite": "skip"})
    head = run.model[3]
    (run.model(batches()[0]) - 1).square().mean().backward()
    run.accelerator.clip_grad_norm_(head.parameters(), 1e-3)
    norm = torch.nn.utils.get_total_norm([p.grad for p in head.parameters()])
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_two_optimizers_each_have_their_own_limit():
    accelerator = guard(accelerate.Accelerator(cpu=True))
    models = [nn.Linear(3, 1), nn.Linear(3, 1)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in models]
    *models, first, second = accelerator.prepare(*models, *optimizers)
    for model in models:
        accelerator.backward(model(torch.full((2, 3), 50.0)).sum())
    accelerator.clip_grad_norm_(models[1].parameters(), 1.0)
    first.step()
    second.step()
    assert [o.optimizer.records()[0].action for o in (first, second)] == ["applied", "clipped"]


def test_a_norm_type_that_the_guard_does_not_measure_is_refused():
    run = Run()
    run.accelerator.backward(run.model(batches()[0]).sum())
    with pytest.raises(ValueError, match="pass norm_type=inf to the guard"):
        run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0, norm_type=math.inf)


def test_an_already_guarded_optimizer_is_kept():
    accelerator, model = accelerate.Accelerator(cpu=True), new_model()
    mine = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=3.0)
    guard(accelerator, model)
    _, prepared = accelerator.prepare(model, mine)
    assert prepared.optimizer is mine
    assert accelerator.prepare(prepared) is prepared


def test_optimizers_prepared_before_the_guard_get_a_warning(caplog):
    accelerator = Run(guarded=False).accelerator
    guard(accelerator)
    assert "1 optimizers are not guarded; call it before prepare" in caplog.text
    caplog.clear()
    Run()
    assert "not guarded" not in caplog.text


def test_guarding_twice_is_refused():
    accelerator = guard(accelerate.Accelerator(cpu=True))
    with pytest.raises(ValueError, match="already guarded"):
        guard(accelerator)


def test_engines_that_step_the_optimizer_themselves_are_refused(monkeypatch):
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "distributed_type", accelerate.DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="takes the steps"):
        guard(accelerator)
