"""The real Trainer of transformers on tiny models, with and without a guard."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
import torch
from torch.utils.data import Dataset

from fastguard import GuardedOptimizer, SpikeRule
from guardtest import require
from guardtest.training import assert_same_bits

transformers = require("transformers")

from fastguard.integrations.huggingface import guard  # noqa: E402

STEPS = 8
BAD = {1, 4}


class Batches(Dataset):
    """Each sample is one batch: the embeddings of a sequence, and the tokens to predict."""

    def __init__(self, left_out: Collection[int] = (), poisoned: Collection[int] = ()) -> None:
        generator = torch.Generator().manual_seed(3)
        samples = []
        for i in range(STEPS):
            embeds = torch.randn(6, 8, generator=generator)
            labels = torch.randint(0, 11, (6,), generator=generator)
            if i in poisoned:
                embeds[2, 3] = math.nan
            if i not in left_out:
                samples.append({"inputs_embeds": embeds, "labels": labels})
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.samples[i]


def language_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return transformers.LlamaForCausalLM(config)


def trainer(folder, data=None, model=None, **arguments):
    """A trainer with one batch per step, in order, and a schedule that counts its own steps."""
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=2,
        learning_rate=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return transformers.Trainer(
        model=model or language_model(),
        args=transformers.TrainingArguments(**{**defaults, **arguments}),
        train_dataset=data or Batches(),
    )


def trained(folder, *, guarded=True, options=None, resume=None, **settings):
    built = trainer(folder, **settings)
    if guarded:
        guard(built, **(options or {}))
    built.train(resume_from_checkpoint=resume)
    return built


def final_state(built):
    """Weights, buffers, optimizer state and schedule at the end of a run."""
    state = {f"model.{k}": v for k, v in built.model.state_dict().items()}
    saved = built.optimizer.state_dict()
    for i, values in saved["state"].items():
        state |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    state["lr"] = [float(group["lr"]) for group in saved["param_groups"]]
    state["schedule"] = built.lr_scheduler.last_epoch
    return state


def flat(model):
    return torch.cat([p.detach().double().view(-1) for p in model.parameters()])


def steps_logged(built, key):
    return [entry[key] for entry in built.state.log_history if "loss" in entry]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [1e6, 0], ids=["never-reached", "none"])
def test_a_run_without_faults_matches_the_unguarded_trainer_bit_for_bit(
    tmp_path, optim, max_grad_norm
):
    settings = dict(optim=optim, max_grad_norm=max_grad_norm)
    own = trained(tmp_path, guarded=False, **settings)
    ours = trained(tmp_path, **settings)
    assert_same_bits(final_state(ours), final_state(own))
    assert steps_logged(ours, "loss") == steps_logged(own, "loss")
    assert steps_logged(ours, "learning_rate") == steps_logged(own, "learning_rate")
    assert steps_logged(ours, "grad_norm") == pytest.approx(
        steps_logged(own, "grad_norm"), rel=1e-6
    )


def test_max_grad_norm_is_applied_once(tmp_path):
    """A second clipping would scale by 0.01 / (0.01 + 1e-6) and change every SGD step by 1e-4."""
    settings = dict(optim="sgd", max_grad_norm=0.01, learning_rate=10.0)
    own = trained(tmp_path, guarded=False, **settings)
    ours = trained(tmp_path, **settings)
    start, theirs, guarded = map(flat, (language_model(), own.model, ours.model))
    assert (guarded - theirs).norm() < 3e-6 * (theirs - start).norm()
    assert steps_logged(ours, "grad_norm") == pytest.approx(
        steps_logged(own, "grad_norm"), rel=1e-5
    )
    assert all(coef < 0.1 for coef in steps_logged(ours, "clip_coef"))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_run_with_bad_batches_ends_like_a_run_without_them(tmp_path, optim, bf16):
    settings = dict(optim=optim, max_grad_norm=0.5, bf16=bf16)
    ours = trained(tmp_path, data=Batches(poisoned=BAD), **settings)
    without = trained(tmp_path, data=Batches(left_out=BAD), **settings)
    assert_same_bits(final_state(ours), final_state(without))
    assert all(torch.isfinite(p).all() for p in ours.model.parameters())
    assert ours.optimizer.optimizer.skipped_steps == len(BAD)
    assert ours.state.global_step == STEPS  # the Trainer counts skipped steps too


def test_the_guard_unscales_the_gradients_of_a_scaler(tmp_path):
    """The Trainer refuses to set up fp16 on a CPU, but can run it."""
    built = trainer(tmp_path, data=Batches(poisoned=BAD), max_grad_norm=0.5)
    built.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    built.accelerator.native_amp = True
    built.accelerator.state._mixed_precision = "fp16"
    callback = guard(built)
    built.train()
    assert built.accelerator.scaler.get_scale() == 2.0**10 / 2 ** len(BAD)
    assert built.lr_scheduler.last_epoch == STEPS - len(BAD)
    assert steps_logged(built, "skipped_steps")[-1] == len(BAD)
    records = callback.optimizer.records()
    for i in set(range(STEPS)) - BAD:
        assert records[i].total_norm == pytest.approx(steps_logged(built, "grad_norm")[i])
        assert records[i].losses["loss"] == pytest.approx(steps_logged(built, "loss")[i], rel=1e-6)
        assert records[i].total_norm < 100  # the norm is unscaled; the scale is 1024


def test_unguarded_the_same_run_ends_in_nan(tmp_path):
    bare = trained(tmp_path, guarded=False, data=Batches(poisoned=BAD))
    assert not torch.isfinite(bare.model.lm_head.weight).any()


def test_one_bad_micro_batch_skips_the_whole_accumulated_step(tmp_path):
    settings = dict(gradient_accumulation_steps=2, max_grad_norm=0.5)
    ours = trained(tmp_path, data=Batches(poisoned={5}), **settings)
    without = trained(tmp_path, data=Batches(left_out={4, 5}), **settings)
    assert_same_bits(final_state(ours), final_state(without))
    losses = [record.losses["loss"] for record in ours.optimizer.optimizer.records()]
    assert math.isnan(losses.pop(2))
    assert losses == pytest.approx(steps_logged(without, "loss"), rel=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_running_statistics_are_restored_after_a_bad_batch(tmp_path, optim):
    def vision_model():
        torch.manual_seed(0)
        config = transformers.ResNetConfig(
            num_channels=2, embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], num_labels=3
        )
        return transformers.ResNetForImageClassification(config)

    def images(left_out=(), poisoned=()):
        generator = torch.Generator().manual_seed(5)
        pixels = torch.randn(2 * STEPS, 2, 16, 16, generator=generator)
        for i in poisoned:
            pixels[2 * i, 0, 3, 3] = math.nan
        kept = [i for i in range(2 * STEPS) if i // 2 not in left_out]
        return [{"pixel_values": pixels[i], "labels": i % 3} for i in kept]

    settings = dict(optim=optim, per_device_train_batch_size=2)
    ours = trained(tmp_path, data=images(poisoned=BAD), model=vision_model(), **settings)
    without = trained(tmp_path, data=images(left_out=BAD), model=vision_model(), **settings)
    assert any(name.endswith("running_var") for name in ours.model.state_dict())
    assert_same_bits(final_state(ours), final_state(without))


@pytest.mark.parametrize("filtered", [True, False], ids=["filter", "no-filter"])
def test_skips_are_visible_in_the_log(tmp_path, filtered):
    built = trained(tmp_path, data=Batches(poisoned=BAD), logging_nan_inf_filter=filtered)
    assert steps_logged(built, "skipped_steps") == [0, 1, 1, 1, 2, 2, 2, 2]
    norms = steps_logged(built, "grad_norm")
    assert {i for i, norm in enumerate(norms) if math.isnan(norm)} == BAD
    # Without the filter, the Trainer logs NaN from then on, because it resets its sum by x - x.
    lost = set() if filtered else set(range(min(BAD), STEPS))
    losses = steps_logged(built, "loss")
    assert {i for i, loss in enumerate(losses) if math.isnan(loss)} == lost


def test_reporters_receive_the_values_of_the_guard(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    built = trainer(tmp_path)
    built.add_callback(Reporter())
    guard(built)
    built.train()
    assert [logs["skipped_steps"] for logs in seen if "loss" in logs] == [0] * STEPS


def test_the_schedule_counts_applied_steps_only(tmp_path):
    built = trained(tmp_path, data=Batches(poisoned=BAD))
    rates = steps_logged(built, "learning_rate")
    without = steps_logged(trained(tmp_path, data=Batches(left_out=BAD)), "learning_rate")
    assert [rate for i, rate in enumerate(rates) if i not in BAD] == without


def test_resuming_is_bitwise_and_restores_the_guard(tmp_path):
    """Step 4 is a spike only if the guard remembers the steps before the interruption."""
    options = dict(spike=SpikeRule(window=8, sigma=6.0, warmup=2))
    settings = dict(
        data=Batches(poisoned=BAD), save_strategy="steps", save_steps=3, max_grad_norm=0.5
    )
    whole = trained(tmp_path / "whole", options=options, **settings)
    resumed = trained(
        tmp_path / "resumed",
        options=options,
        resume=str(tmp_path / "whole" / "checkpoint-3"),
        **settings,
    )
    assert_same_bits(final_state(resumed), final_state(whole))
    saved, expected = (b.optimizer.state_dict()["fastguard"] for b in (resumed, whole))
    assert_same_bits(saved, expected)
    assert saved["counters"].tolist() == [STEPS, STEPS - 3, 3, 0, 0]
    record = resumed.optimizer.optimizer.records()[0]
    assert (record.step, record.reason) == (4, "grad_spike")
    for key in ("loss", "grad_norm", "learning_rate", "skipped_steps"):
        logged, expected = steps_logged(resumed, key), steps_logged(whole, key)
        assert logged == pytest.approx(expected, rel=0, abs=0, nan_ok=True), key


def test_a_limit_given_to_the_guard_replaces_max_grad_norm(tmp_path):
    settings = dict(optim="sgd")
    ours = trained(tmp_path, options={"max_norm": 0.25}, max_grad_norm=1e-3, **settings)
    same = trained(tmp_path, max_grad_norm=0.25, **settings)
    assert_same_bits(final_state(ours), final_state(same))


def test_an_already_guarded_optimizer_is_kept(tmp_path):
    built = trainer(tmp_path, data=Batches(poisoned=BAD))
    mine = GuardedOptimizer(torch.optim.SGD(built.model.parameters(), lr=0.1))
    built.optimizer = mine
    guard(built)
    built.train()
    assert built.optimizer.optimizer is mine
    assert mine.skipped_steps == len(BAD)


def test_a_second_train_call_uses_the_same_guard(tmp_path):
    built = trainer(tmp_path)
    callback = guard(built)
    built.train()
    built.train()
    assert callback.optimizer.steps_taken == 2 * STEPS


def test_a_trainer_can_be_guarded_after_an_unguarded_run(tmp_path):
    built = trained(tmp_path, guarded=False)
    callback = guard(built)
    built.train()
    assert callback.optimizer.applied_steps == STEPS


def test_guarding_twice_is_refused(tmp_path):
    built = trainer(tmp_path)
    guard(built)
    with pytest.raises(ValueError, match="already guarded"):
        guard(built)


def test_a_replaced_accelerator_must_be_guarded_again(tmp_path):
    built = trainer(tmp_path)
    guard(built)
    built.create_accelerator_and_postprocess()
    with pytest.raises(RuntimeError, match=r"call guard\(trainer\) again"):
        built.train()
