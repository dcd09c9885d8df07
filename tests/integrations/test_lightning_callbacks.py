"""Lightning's own callbacks and unusual modules give the same bits as without the guard."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from guardtest import require
from guardtest.plain_loop import BAD, batches
from guardtest.training import assert_same_bits

lightning = require("lightning")

from lightning.pytorch import callbacks as lightning_callbacks  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from fastguard import GuardedOptimizer, read_records  # noqa: E402
from fastguard.integrations.lightning import GuardCallback  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    """Hides Lightning's advice on workers and log intervals."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


class Module(lightning.LightningModule):
    """A body and a head; one of them can be frozen."""

    def __init__(self, schedule=None):
        super().__init__()
        torch.manual_seed(0)
        self.schedule = schedule
        self.lr = 0.05
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def loss(self, batch):
        return (self.head(self.body(batch)) - 1).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=self.lr, momentum=0.9)
        if self.schedule is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return [optimizer], [{"scheduler": schedule, "interval": self.schedule}]


class LateScheduler(Module):
    def on_train_start(self):
        self.late = torch.optim.lr_scheduler.StepLR(self.trainer.optimizers[0], 2)

    def on_train_batch_end(self, *_):
        self.late.step()


class NoOptimizer(Module):
    def configure_optimizers(self):
        return None


class ManyBatchesAtOnce(Module):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class InTheMiddle(lightning.Callback):
    """Calls a function with the trainer and the module after the third step."""

    def __init__(self, act):
        self.act = act

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 3:
            self.act(trainer, pl_module)


class Unfreezing(lightning_callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer)


def copied(trainer, module):
    copy.deepcopy(trainer)
    copy.deepcopy(module)
    copy.deepcopy(trainer.optimizers[0])


def saved(trainer, module):
    """Saves the trainer with `torch.save`, as users do, and pickles it as for spawned processes."""
    torch.save(module, io.BytesIO())
    twin = pickle.loads(pickle.dumps(trainer))
    assert type(twin.optimizers[0]) is type(trainer.optimizers[0])


def fitted(folder, module, *others, guarded, data=None, **settings):
    """The state after a fit, and the logged values except those of the guard."""
    defaults = dict(
        max_epochs=3,
        accelerator="cpu",
        log_every_n_steps=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    callbacks = [*([guarded] if guarded else []), *others]
    trainer = lightning.Trainer(**{**defaults, **settings}, callbacks=callbacks)
    data = batches() if data is None else data
    trainer.fit(module, DataLoader(data, batch_size=None))
    metrics = trainer.callback_metrics.items()
    logged = {k: float(v) for k, v in metrics if not k.startswith("train/")}
    return trainer, {**module.state_dict()}, logged


def finder():
    return lightning_callbacks.LearningRateFinder(num_training_steps=20)


CASES = {
    "averaging": (
        Module,
        lambda: lightning_callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    ),
    "averaging-schedule": (
        lambda: Module("epoch"),
        lambda: lightning_callbacks.StochasticWeightAveraging(1e-2, 1, annealing_strategy="linear"),
    ),
    "moving-average": (Module, lightning_callbacks.EMAWeightAveraging),
    "finder": (Module, finder),
    "finder-schedule": (lambda: Module("step"), finder),
    "late-scheduler": (LateScheduler, lightning.Callback),
    "no-optimizer": (NoOptimizer, lightning.Callback),
    "dataloader-iter": (ManyBatchesAtOnce, lightning.Callback),
    "unfreezing": (Module, Unfreezing),
    "accumulation": (
        Module,
        lambda: lightning_callbacks.GradientAccumulationScheduler({0: 1, 1: 3}),
    ),
    "copied": (lambda: Module("step"), lambda: InTheMiddle(copied)),
    "saved": (lambda: Module("step"), lambda: InTheMiddle(saved)),
}


@pytest.mark.parametrize("first", [True, False], ids=["guard-first", "guard-last"])
@pytest.mark.parametrize("build, other", CASES.values(), ids=CASES)
def test_callbacks_and_modules_behave_as_without_the_guard(tmp_path, build, other, first):
    _, expected, logged = fitted(tmp_path, build(), other(), guarded=None)
    guard = GuardCallback()
    if first:
        _, ours, seen = fitted(tmp_path, build(), other(), guarded=guard)
    else:
        _, ours, seen = fitted(tmp_path, build(), other(), guard, guarded=None)
    assert_same_bits(ours, expected)
    assert seen == logged


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("schedule", [None, "step", "epoch"])
def test_learning_rate_monitor_logs_the_same_as_without_the_guard(tmp_path, schedule, late):
    """Weight averaging creates a schedule for the guarded optimizer during the fit."""
    logged = []
    for guarded in (None, GuardCallback()):
        monitor = lightning_callbacks.LearningRateMonitor(log_momentum=True, log_weight_decay=True)
        others = [lightning_callbacks.StochasticWeightAveraging(1e-2, 1)] if late else []
        settings = dict(guarded=guarded, logger=CSVLogger(tmp_path))
        fitted(tmp_path, Module(schedule), *others, monitor, **settings)
        logged.append(monitor.lrs)
    assert list(logged[0]) == ["lr-SGD"]
    assert logged[1] == logged[0]


class Manual(Module):
    """Saves and loads its optimizer through the wrapper from `self.optimizers()`."""

    def __init__(self, by_hand=False):
        super().__init__()
        self.automatic_optimization = False
        self.by_hand = by_hand

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return GuardedOptimizer(optimizer) if self.by_hand else optimizer

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
        if batch_idx == 2:
            self.state = copy.deepcopy(optimizer.state_dict())
        if batch_idx == 5:
            optimizer.load_state_dict(self.state)


@pytest.mark.parametrize("by_hand", [False, True], ids=["callback", "by-hand"])
def test_a_state_loaded_through_lightnings_wrapper_reaches_the_guard(tmp_path, by_hand):
    guard = None if by_hand else GuardCallback()
    data = batches(poisoned=BAD)
    trainer, _, _ = fitted(tmp_path, Manual(by_hand), guarded=guard, data=data, max_epochs=1)
    optimizer = trainer.optimizers[0]
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (
        4,
        1,
    )  # 2 + 1 were loaded, and 2 more were taken
    assert optimizer.steps_taken == 5
    wrapped = trainer.strategy._lightning_optimizers[0]
    assert wrapped.applied_steps == 4
    assert [r.step for r in wrapped.records()] == [1, 2, 3, 4, 5, 6, 4, 5]
    assert optimizer.records() == []  # each record is returned once


def test_a_copy_made_during_a_fit_is_an_independent_guarded_trainer(tmp_path):
    """The copy counts, tags and skips without any effect on the original and its file."""
    twins = []

    def branch(trainer, module):
        twins.append(copy.deepcopy(trainer))

    path = tmp_path / "records.jsonl"
    guard = GuardCallback(records=path)
    data = batches(poisoned=BAD)
    trainer, _, _ = fitted(
        tmp_path, Module(), InTheMiddle(branch), guarded=guard, data=data, max_epochs=1
    )
    (twin,) = twins
    optimizer, module = twin.optimizers[0], twin.lightning_module
    assert optimizer.steps_taken == 3 and optimizer is not trainer.optimizers[0]
    module.loss(torch.full((6, 4), math.nan)).backward()
    before = {k: v.clone() for k, v in module.named_parameters()}
    optimizer.step()
    assert_same_bits(dict(module.named_parameters()), before)
    assert optimizer.skipped_steps == 2
    assert optimizer.records()[-1].tag == {"epoch": 0, "batch": 2, "global_step": 4}
    assert [r.step for r in read_records(path)] == [*range(1, 9)]


def test_a_fit_that_fails_leaves_nothing_on_the_trainer(tmp_path):
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise KeyError("in the middle")
            return super().training_step(batch, batch_idx)

    guard = GuardCallback()
    with pytest.raises(KeyError):
        fitted(tmp_path, Fails(), guarded=guard)
    trainer, expected, _ = fitted(tmp_path, Module(), guarded=None)
    again, ours, _ = fitted(tmp_path, Module(), guarded=guard)
    assert_same_bits(ours, expected)
    for run in (trainer, again):
        assert "update_lr_schedulers" not in vars(run.fit_loop.epoch_loop)
        assert "clip_gradients" not in vars(run.precision_plugin)
