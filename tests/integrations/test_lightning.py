"""The real Trainer of Lightning, with and without a guard."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection

import pytest
import torch
from torch import nn

from fastguard import GuardedOptimizer, SpikeRule
from guardtest import plain_loop, require
from guardtest.plain_loop import BAD, OPTIMIZERS, STEPS
from guardtest.training import assert_same_bits, snapshot

lightning = require("lightning")

from fastguard.integrations.lightning import GuardCallback  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    """Hides Lightning's advice on workers and log intervals."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def batches(left_out: Collection[int] = (), poisoned: Collection[int] = (), n: int = STEPS):
    return list(plain_loop.batches(left_out, poisoned, n))


class Module(lightning.LightningModule):
    """A network with running statistics and a schedule per step."""

    def __init__(self, optimizer="adamw-fused", schedule_interval="step"):
        super().__init__()
        torch.manual_seed(0)
        self.optimizer_name, self.schedule_interval = optimizer, schedule_interval
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.losses = []

    def loss(self, x):
        loss = (self.net(x) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        inner = OPTIMIZERS[self.optimizer_name](self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(inner, 0.9)
        return {
            "optimizer": inner,
            "lr_scheduler": {"scheduler": schedule, "interval": self.schedule_interval},
        }


class Manual(Module):
    """The same network in manual optimization, clipped as Lightning's documentation advises."""

    def __init__(self, optimizer="adamw-fused", clip=0.5):
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.clip = clip

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, self.clip, "norm")
        optimizer.step()


def trained(data, module=None, *, guarded=True, resume=None, **settings):
    callbacks = [*settings.pop("callbacks", []), *([GuardCallback()] if guarded is True else [])]
    if isinstance(guarded, GuardCallback):
        callbacks.append(guarded)
    defaults = dict(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = lightning.Trainer(**{**defaults, **settings}, callbacks=callbacks)
    module = module or Module()
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def final_state(trainer):
    optimizer = trainer.optimizers[0]
    return {
        **trainer.lightning_module.state_dict(),
        **snapshot(optimizer),
        "lr": [group["lr"] for group in optimizer.param_groups],
        "schedule": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [1e6, 0, None], ids=["never-reached", "zero", "none"])
def test_a_run_without_faults_matches_plain_lightning_bit_for_bit(optimizer, clip):
    own = trained(batches(), Module(optimizer), guarded=False, gradient_clip_val=clip)
    ours = trained(batches(), Module(optimizer), gradient_clip_val=clip)
    assert_same_bits(final_state(ours), final_state(own))


@pytest.mark.parametrize("build", [Module, Manual], ids=["automatic", "manual"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_a_run_with_bad_batches_ends_like_a_run_without_them(build, precision):
    def run(data):
        data = [x.to(dtype) for x in data]
        clip = {} if build is Manual else {"gradient_clip_val": 0.5}
        return trained(data, build(), precision=precision, **clip)

    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    ours, without = run(batches(poisoned=BAD)), run(batches(left_out=BAD))
    assert_same_bits(final_state(ours), final_state(without))
    assert all(torch.isfinite(p).all() for p in ours.lightning_module.parameters())
    assert ours.optimizers[0].skipped_steps == len(BAD)
    assert ours.global_step == STEPS  # Lightning counts skipped steps too


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_bad_batches_with_other_optimizers(optimizer):
    ours = trained(batches(poisoned=BAD), Module(optimizer), gradient_clip_val=0.5)
    without = trained(batches(left_out=BAD), Module(optimizer), gradient_clip_val=0.5)
    assert_same_bits(final_state(ours), final_state(without))


def test_unguarded_the_same_run_ends_in_nan():
    bare = trained(batches(poisoned=BAD), guarded=False)
    assert not torch.isfinite(bare.lightning_module.net[0].weight).any()


def test_one_bad_micro_batch_skips_the_whole_accumulated_step():
    settings = dict(accumulate_grad_batches=2, gradient_clip_val=0.5)
    ours = trained(batches(poisoned={5}), **settings)
    without = trained(batches(left_out={4, 5}), **settings)
    assert_same_bits(final_state(ours), final_state(without))


@pytest.mark.parametrize("build", [Module, Manual], ids=["automatic", "manual"])
def test_clipping_matches_lightnings_within_rounding_and_happens_once(build):
    """A second clipping would scale by 0.01 / (0.01 + 1e-6) and change every step by 1e-4."""

    def run(guarded):
        module = Manual("sgd", clip=0.01) if build is Manual else Module("sgd")
        clip = {} if build is Manual else {"gradient_clip_val": 0.01}
        return trained(batches(), module, guarded=guarded, **clip)

    def flat(trainer):
        return torch.cat([p.detach().view(-1) for p in trainer.lightning_module.parameters()])

    own, ours = run(False), run(True)
    start = torch.cat([p.detach().view(-1) for p in Module().parameters()])
    assert (flat(ours) - flat(own)).norm() < 3e-5 * (flat(own) - start).norm()
    assert {record.action for record in ours.optimizers[0].records()} == {"clipped"}


def test_clipping_by_value_is_moved_into_the_guard_and_still_finds_inf():
    class Infinite(Module):
        def on_after_backward(self):
            if self.trainer.global_step in BAD:
                self.net[3].weight.grad[0, 0] = math.inf

    settings = dict(gradient_clip_val=0.01, gradient_clip_algorithm="value")
    own = trained(batches(), Module("sgd"), guarded=False, **settings)
    ours = trained(batches(), Module("sgd"), **settings)
    assert_same_bits(final_state(ours), final_state(own))
    assert "clip_value" not in ours.optimizers[0].param_groups[0]
    ours = trained(batches(), Infinite("sgd"), **settings)
    without = trained(batches(left_out=BAD), Module("sgd"), **settings)
    assert_same_bits(final_state(ours), final_state(without))


def test_a_module_may_override_configure_gradient_clipping():
    class Chooses(Module):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, **_):
            if self.trainer.global_step % 2:
                self.clip_gradients(optimizer, gradient_clip_val, "norm")

    ours = trained(batches(), Chooses("sgd"), gradient_clip_val=1e-3)
    actions = [record.action for record in ours.optimizers[0].records()]
    assert actions == ["applied", "clipped"] * (STEPS // 2)


def test_a_limit_of_the_guard_has_priority():
    def run(clip):
        callback = GuardCallback(max_norm=0.25)
        return trained(batches(), Module("sgd"), guarded=callback, gradient_clip_val=clip)

    assert_same_bits(final_state(run(1e-3)), final_state(run(None)))


def test_lightnings_mixed_precision_plugin_refuses_to_clip_this_optimizer():
    """The reason why the guard replaces the clipping of the plugin."""

    class Guarded(Module):
        def configure_optimizers(self):
            return GuardedOptimizer(torch.optim.SGD(self.parameters(), lr=0.1))

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trained(batches(), Guarded(), guarded=False, precision="bf16-mixed", gradient_clip_val=1.0)
    run = trained(batches(), Guarded(), precision="bf16-mixed", gradient_clip_val=1e-3)
    assert {record.action for record in run.optimizers[0].records()} == {"clipped"}


def test_the_guard_unscales_the_gradients_of_a_scaler():
    """Runs 16-mixed on a CPU, which needs the plugin of Lightning."""
    from lightning.pytorch.plugins import MixedPrecision

    def run(data):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        module = Module()
        return trained(data, module, plugins=[plugin], gradient_clip_val=0.5), module, scaler

    (ours, module, scaler), (without, *_) = run(batches(poisoned=BAD)), run(batches(left_out=BAD))
    assert ours.optimizers[0].skipped_steps == len(BAD)
    assert ours.lr_scheduler_configs[0].scheduler.last_epoch == STEPS - len(BAD)
    assert scaler.get_scale() == 2.0**10 / 2 ** len(BAD)
    assert_same_bits(final_state(ours), final_state(without))  # scales are powers of two
    records = ours.optimizers[0].records()
    losses = [record.losses["loss"] for record in records]
    assert losses == pytest.approx(module.losses, rel=1e-5, nan_ok=True)
    assert max(r.total_norm for r in records) < 100  # the norm is unscaled; the scale is 1024


class Metrics(lightning.Callback):
    """Collects the metrics that a user's callback sees after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append({k: v.item() for k, v in trainer.callback_metrics.items()})


@pytest.mark.parametrize("build", [Module, Manual], ids=["automatic", "manual"])
def test_the_values_of_the_guard_are_in_callback_metrics(build):
    metrics = Metrics()
    run = trained(
        batches(poisoned=BAD), build(), guarded=False, callbacks=[GuardCallback(), metrics]
    )
    assert [seen["train/skipped_steps"] for seen in metrics.seen] == [0, 1, 1, 1, 2, 2, 2, 2]
    norms = [seen["train/grad_norm"] for seen in metrics.seen]
    assert {i for i, norm in enumerate(norms) if math.isnan(norm)} == BAD
    records = run.optimizers[0].records()
    applied = [i for i in range(STEPS) if i not in BAD]
    assert [norms[i] for i in applied] == pytest.approx([records[i].total_norm for i in applied])
    coefs = [seen["train/clip_coef"] for seen in metrics.seen]
    assert coefs == pytest.approx([record.clip_coef for record in records])


def test_the_guard_receives_the_mean_loss_of_a_step():
    module = Module()
    run = trained(batches(), module, accumulate_grad_batches=4)
    losses = [record.losses["loss"] for record in run.optimizers[0].records()]
    expected = [sum(module.losses[i : i + 4]) / 4 for i in (0, 4)]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_the_guard_receives_the_loss_in_manual_optimization():
    module = Manual()
    run = trained(batches(), module)
    losses = [record.losses["loss"] for record in run.optimizers[0].records()]
    assert losses == pytest.approx(module.losses, rel=1e-6)


def test_resuming_is_bitwise_and_restores_the_guard(tmp_path):
    """The second epoch continues with the spike rule's baseline and the counters of the first."""

    def callback():
        return GuardCallback(spike=SpikeRule(window=8, sigma=50.0, warmup=2))

    data = batches(poisoned=BAD)
    whole = trained(data, guarded=callback(), max_epochs=2, gradient_clip_val=0.5)
    first = trained(data, guarded=callback(), max_epochs=1, gradient_clip_val=0.5)
    path = tmp_path / "first.ckpt"
    first.save_checkpoint(path)
    resumed = trained(
        data, guarded=callback(), max_epochs=2, gradient_clip_val=0.5, resume=str(path)
    )
    assert_same_bits(final_state(resumed), final_state(whole))
    saved, expected = (t.optimizers[0].state_dict()["fastguard"] for t in (resumed, whole))
    assert_same_bits(saved, expected)
    assert saved["counters"].tolist() == [16, 12, 4, 0, 0]
    assert resumed.callback_metrics["train/skipped_steps"] == 4


def test_a_schedule_per_epoch_ignores_skipped_steps():
    run = trained(batches(poisoned={STEPS - 1}), Module(schedule_interval="epoch"), max_epochs=3)
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 3


def test_several_optimizers_in_manual_optimization():
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(4, 1)

        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.net, self.other)]

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer, module, x in (
                (first, self.net, batch),
                (second, self.other, batch[1:2]),
            ):
                optimizer.zero_grad()
                self.manual_backward(module(x).square().mean())
                if module is self.other:
                    self.clip_gradients(optimizer, 1e-3, "norm")
                optimizer.step()

    # The second optimizer does not use row 2, which contains NaN.
    run = trained(batches(poisoned=BAD), Two())
    assert [o.skipped_steps for o in run.optimizers] == [len(BAD), 0]
    assert {r.action for r in run.optimizers[1].records()} == {"clipped"}
    assert run.callback_metrics["train/skipped_steps/0"] == len(BAD)
    assert run.callback_metrics["train/skipped_steps/1"] == 0


def test_lightnings_methods_are_restored_even_after_an_error():
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            raise KeyError("in the middle")

    for module in (Module(), Fails()):
        trainer = None
        try:
            trainer = trained(batches(), module)
        except KeyError:
            pass
        assert "lr_scheduler_step" not in vars(module)
        if trainer is not None:
            assert "clip_gradients" not in vars(trainer.precision_plugin)


def test_one_callback_can_be_used_for_several_fits():
    callback = GuardCallback()
    trained(batches(poisoned=BAD), guarded=callback)
    trained(batches(), guarded=callback)
    assert callback.optimizers[0].skipped_steps == 0
    assert callback.optimizers[0].applied_steps == STEPS
