"""Guarded objects can be copied, pickled and launched as without the guard."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastguard import read_records
from fastguard.integrations.replaced import ReplacedMethods
from guardtest import require
from guardtest.gloo_groups import end_groups
from guardtest.plain_loop import batches, new_model
from guardtest.training import assert_same_bits


def reloaded(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    """Returns a whole object after `torch.save` and `torch.load`."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_copy = pytest.mark.parametrize("copied", [copy.deepcopy, reloaded, saved])


def accelerator_of(model, **options):
    accelerate = require("accelerate")
    from fastguard.integrations.accelerate import guard

    return guard(accelerate.Accelerator(cpu=True), model, **options)


def fabric_of(model, **options):
    fabric_module = require("lightning.fabric")
    from fastguard.integrations.fabric import guard

    return guard(fabric_module.Fabric(accelerator="cpu", devices=1), model, **options)


def one_step(backward, model, optimizer, x, clip=None):
    backward((model(x) - 1).square().mean())
    if clip is not None:
        clip()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "copied, prepared",
    [(copy.deepcopy, False), (reloaded, False), (reloaded, True), (saved, False), (saved, True)],
)
def test_a_copy_of_a_guarded_accelerator_is_guarded(tmp_path, copied, prepared):
    model = new_model()
    accelerator = accelerator_of(model, records=tmp_path / "records.jsonl")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if prepared:
        model, optimizer = accelerator.prepare(model, optimizer)
        one_step(accelerator.backward, model, optimizer, batches()[0])
    # Without a guard, deepcopy of an accelerator returns the accelerator itself.
    accelerator, model, optimizer = copied((accelerator, model, optimizer))
    if not prepared:
        model, optimizer = accelerator.prepare(model, optimizer)

    def clip():
        accelerator.clip_grad_norm_(model.parameters(), 1e-3)

    for x in batches(poisoned={1})[:3]:
        one_step(accelerator.backward, model, optimizer, x, clip)
    one_step(accelerator.backward, model, optimizer, batches()[3])
    records = optimizer.optimizer.records()[-4:]
    assert [r.action for r in records] == ["clipped", "skipped", "clipped", "applied"]
    assert all("loss" in r.losses and r.tag["global_step"] == r.step for r in records)
    assert all(b.isfinite().all() for b in model.buffers())


@every_copy
def test_a_copy_of_a_guarded_fabric_is_guarded(copied):
    model = new_model()
    twin, model, optimizer = copied((fabric_of(model), model, torch.optim.SGD(model.parameters())))
    model, optimizer = twin.setup(model, optimizer)
    for x in batches(poisoned={1})[:3]:
        one_step(
            twin.backward, model, optimizer, x, lambda: twin.clip_gradients(model, optimizer, 1e-3)
        )
    assert [r.action for r in optimizer.records()][1] == "skipped"
    assert all("loss" in r.losses for r in optimizer.records())
    assert all(b.isfinite().all() for b in model.buffers())


def test_a_copy_of_a_fabric_with_its_model_and_optimizer_is_independent():
    """Without the guard this copy fails: Fabric's optimizer wrapper recurses without end."""
    model = new_model()
    fabric = fabric_of(model)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    one_step(fabric.backward, model, optimizer, batches()[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin, its_model, its_optimizer = copy.deepcopy((fabric, model, optimizer))
    for x in batches(poisoned={0})[:2]:
        one_step(twin.backward, its_model, its_optimizer, x)
    assert (its_optimizer.applied_steps, its_optimizer.skipped_steps) == (2, 1)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (1, 0)
    assert_same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_a_plain_backward_is_allowed_if_fabric_allows_it(precision):
    fabric_module = require("lightning.fabric")
    from fastguard.integrations.fabric import guard

    def final(guarded):
        fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = new_model()
        if guarded:
            guard(fabric, model)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for x in batches().to(next(model.parameters()).dtype):
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {**model.state_dict()}

    assert_same_bits(final(True), final(False))


def test_a_plain_backward_is_refused_if_fabric_refuses_it():
    """With mixed precision, Fabric may have to scale the loss."""
    fabric_module = require("lightning.fabric")
    from lightning.fabric.plugins import MixedPrecision

    from fastguard.integrations.fabric import guard

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    model = new_model()
    fabric = guard(fabric_module.Fabric(accelerator="cpu", devices=1, plugins=[plugin]), model)
    model, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
        model(batches()[0]).sum().backward()


class Trained(nn.Module):
    """A model that the Trainer of transformers can train."""

    def __init__(self):
        super().__init__()
        self.net = new_model()

    def forward(self, x, labels):
        y = self.net(x[0])
        return {"loss": (y - 1).square().mean(), "logits": y}


def trainer_in(folder):
    transformers = require("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"x": x, "labels": torch.zeros(1)} for x in batches(poisoned={1})]
    return transformers.Trainer(model=Trained(), args=arguments, train_dataset=data)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded])
def test_a_copy_of_a_guarded_trainer_is_guarded(tmp_path, copied, trained):
    from fastguard.integrations.huggingface import guard

    path = tmp_path / "records.jsonl"
    trainer = trainer_in(tmp_path)
    guard(trainer, records=path)
    if trained:
        if copied is reloaded:
            pytest.skip("transformers' own schedules cannot be pickled")
        trainer.train()
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    twin = copied(trainer)
    twin.train()
    assert_same_bits(dict(trainer.model.state_dict()), weights)
    assert any((twin.model.state_dict()[k] != v).any() for k, v in weights.items())
    norms = [e["grad_norm"] for e in twin.state.log_history if "grad_norm" in e]
    assert [math.isnan(norm) for norm in norms] == [i == 1 for i in range(8)]
    records = list(read_records(path))[-8:]
    assert [r.tag["global_step"] for r in records] == [*range(1, 9)]
    assert [r.action == "skipped" for r in records] == [i == 1 for i in range(8)]
    if not trained:
        trainer.train()  # the original is still guarded
        assert trainer.optimizer.optimizer.skipped_steps == 1


def loop_for_launchers(folder):
    """Trains in a process of its own."""
    import accelerate

    from fastguard.integrations.accelerate import guard

    torch.set_num_threads(1)
    model = new_model()
    accelerator = guard(
        accelerate.Accelerator(cpu=True), model, records=f"{folder}/run/records.jsonl"
    )
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for x in batches(poisoned={1})[:3]:
        one_step(accelerator.backward, model, optimizer, x)
    end_groups()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["notebook", "debug"])
def test_accelerates_launchers_run_a_guarded_loop(tmp_path, launcher):
    accelerate = require("accelerate")
    if launcher == "notebook":
        accelerate.notebook_launcher(loop_for_launchers, (tmp_path,), num_processes=1)
    else:  # two forked processes; the first one writes
        accelerate.debug_launcher(loop_for_launchers, (tmp_path,), num_processes=2)
    actions = [r.action for r in read_records(tmp_path / "run" / "records.jsonl", strict=True)]
    assert actions == ["applied", "skipped", "applied"]


def loop_for_fabric(fabric, model, optimizer):
    """Trains with the guarded Fabric of the process that launched this one."""
    torch.set_num_threads(1)
    model, optimizer = fabric.setup(model, optimizer)
    for x in batches(poisoned={1})[:3]:
        one_step(fabric.backward, model, optimizer, x)
    end_groups()
    return optimizer.skipped_steps


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_guarded_fabric_works_in_launched_processes(tmp_path, monkeypatch, method):
    fabric_module = require("lightning.fabric")
    from lightning.fabric.strategies import DDPStrategy

    from fastguard.integrations.fabric import guard

    # A spawned process imports this file by name and needs the preparation of conftest.py.
    (tmp_path / "sitecustomize.py").write_text(
        "from guardtest.torchvision_ops import define_missing_operators\n"
        "define_missing_operators()\n"
    )
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{here.parent / 'support'}:{here}")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_copies

    strategy = DDPStrategy(start_method=method, process_group_backend="gloo")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    model = test_copies.new_model()
    guard(fabric, model, records=tmp_path / "records.jsonl")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fabric.launch(test_copies.loop_for_fabric, model, optimizer) == 1
    records = list(read_records(tmp_path / "records.jsonl", strict=True))
    assert [r.action for r in records] == ["applied", "skipped", "applied"]
    sys.modules.pop("test_copies", None)


def test_methods_replaced_by_other_code_are_called_and_restored():
    class Owner:
        def act(self):
            return "own"

    class Guard:
        def __init__(self, owner):
            self.owners = ReplacedMethods(owner, self, ["act"])

        def act(self):
            return f"guarded {self.owners.original('act')()}"

    for put_first in (False, True):
        owner = Owner()
        if put_first:
            owner.act = lambda: "put there"
        guard = Guard(owner)
        assert owner.act() == ("guarded put there" if put_first else "guarded own")
        twin = copy.deepcopy(guard)
        assert twin.owners.owner.act.__self__ is twin
        guard.owners.restore()
        assert owner.act() == ("put there" if put_first else "own")
