"""Records of a run in each trainer: a file that the commands find, sinks, automatic tags."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fastguard import GuardedOptimizer, read_records
from fastguard.integrations.shared import BatchSpan, RunRecords
from guardtest import require
from guardtest.plain_loop import batches, new_model

BATCHES = 5  # per epoch; the fourth batch is NaN
POISONED = 3


def loader() -> DataLoader:
    return DataLoader(batches(poisoned={POISONED}, n=BATCHES), batch_size=None)


def loss_of(model, x):
    return (model(x) - 1).square().mean()


def with_huggingface(folder, options, *, epochs=1, accumulate=1, checkpoint=None):
    transformers = require("transformers")
    from fastguard.integrations.huggingface import guard

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = new_model()

        def forward(self, x, labels):
            y = self.net(x[0])
            return {"loss": (y - 1).square().mean(), "logits": y}

    trainer = transformers.Trainer(
        model=Model(),
        args=transformers.TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=epochs,
            train_sampling_strategy="sequential",
            save_strategy="steps",
            save_steps=2,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"x": x, "labels": torch.zeros(1)} for x in loader()],
    )
    guard(trainer, **options)
    if checkpoint is not None:
        checkpoint = str(folder / "checkpoints" / f"checkpoint-{checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)


def with_accelerate(folder, options, *, epochs=1, accumulate=1, checkpoint=None):
    accelerate = require("accelerate")
    from fastguard.integrations.accelerate import guard

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = new_model()
    guard(accelerator, model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # An iterable data set, so that Accelerate neither shuffles nor changes the batches.
    data = DataLoader([*batches(poisoned={POISONED}, n=BATCHES)], batch_size=1)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    begin = 0
    if checkpoint is not None:
        accelerator.load_state(str(folder / "state"))
        begin = checkpoint
    for epoch in range(epochs):
        rest = accelerate.skip_first_batches(data, begin) if epoch == 0 and begin else data
        for i, x in enumerate(rest, begin if epoch == 0 else 0):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x[0]))
                optimizer.step()
                optimizer.zero_grad()
            if checkpoint is None and epoch == 0 and i == 1:
                accelerator.save_state(str(folder / "state"))
    accelerator.end_training()


def with_fabric(folder, options, *, epochs=1, accumulate=1, checkpoint=None, plain=False):
    fabric_module = require("lightning.fabric")
    from fastguard.integrations.fabric import guard

    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model = new_model()
    guard(fabric, model, **options)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data, validation = fabric.setup_dataloaders(loader(), loader())
    state = {"model": model, "optimizer": optimizer}
    if checkpoint is not None:
        fabric.load(folder / "state.ckpt", state)
    for epoch in range(epochs):
        for i, x in enumerate(data):
            if checkpoint is not None and epoch == 0 and i < checkpoint:
                continue
            loss = loss_of(model, x)
            loss.backward() if plain else fabric.backward(loss)
            if i == 2:
                with torch.no_grad():
                    for y in validation:
                        model.eval()(y)
                model.train()
            if (i + 1) % accumulate == 0 or i + 1 == BATCHES:
                optimizer.step()
                optimizer.zero_grad()
            if checkpoint is None and epoch == 0 and i == 1:
                fabric.save(folder / "state.ckpt", state)


def with_lightning(folder, options, *, epochs=1, accumulate=1, checkpoint=None):
    lightning = require("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from fastguard.integrations.lightning import GuardCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = new_model()

        def training_step(self, batch, batch_idx):
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        callbacks=[GuardCallback(**options), saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = None if checkpoint is None else folder / f"step={checkpoint}.ckpt"
    trainer.fit(Module(), loader(), ckpt_path=path)


TRAINERS = {
    "huggingface": with_huggingface,
    "accelerate": with_accelerate,
    "fabric": with_fabric,
    "fabric-plain-backward": functools.partial(with_fabric, plain=True),
    "lightning": with_lightning,
}
every_trainer = pytest.mark.parametrize("trained", TRAINERS.values(), ids=TRAINERS)


def places(records) -> list[tuple[int, int | str, int]]:
    return [(r.tag["epoch"], r.tag["batch"], r.tag["global_step"]) for r in records]


def fastguard(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastguard", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@every_trainer
def test_each_step_writes_a_record_with_its_epoch_and_batch(tmp_path, trained):
    seen = []
    path = tmp_path / "run" / "records.jsonl"
    trained(tmp_path, {"records": path, "sinks": [seen.append]}, epochs=2)
    records = list(read_records(path, strict=True))
    assert places(records) == [
        (epoch, batch, epoch * BATCHES + batch + 1) for epoch in (0, 1) for batch in range(BATCHES)
    ]
    assert [r.step for r in records if r.action == "skipped"] == [4, 9]
    assert list(map(str, seen)) == list(map(str, records))


@every_trainer
def test_the_tag_of_an_accumulated_step_is_a_span_of_batches(tmp_path, trained):
    path = tmp_path / "records.jsonl"
    trained(tmp_path, {"records": str(path)}, epochs=2, accumulate=2)
    spans = ["0-1", "2-3", 4]
    if isinstance(trained, functools.partial):  # the guard does not see a plain backward()
        spans = [1, 3, 4]
    found = places(read_records(path))
    assert found == [(e, s, e * 3 + i + 1) for e in (0, 1) for i, s in enumerate(spans)]


@every_trainer
def test_a_resumed_run_appends(tmp_path, trained):
    path = tmp_path / "records.jsonl"
    trained(tmp_path, {"records": path})
    trained(tmp_path, {"records": path}, checkpoint=2)
    records = list(read_records(path, strict=True))
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 3, 4, 5]
    assert places(records)[5:] == places(records)[2:5] == [(0, i, i + 1) for i in (2, 3, 4)]


@every_trainer
def test_monitor_and_report_find_the_run(tmp_path, trained):
    trained(tmp_path, {"records": tmp_path / "run" / "records.jsonl"})
    shown = fastguard("monitor", tmp_path / "run", "--once", "--json")
    assert shown.returncode == 1, shown.stderr  # status 1: the run has an incident
    state = json.loads(shown.stdout)
    assert (state["records"], state["n_incidents"]) == (BATCHES, 1)
    assert state["incidents"][0]["tag"] == {"epoch": 0, "batch": POISONED, "global_step": 4}
    written = fastguard("report", tmp_path / "run")
    assert written.returncode == 0, written.stderr  # status 0: a good step followed the incident
    page = (tmp_path / "run" / "records.html").read_text()
    assert "epoch 0, batch 3, global_step 4" in page


@pytest.mark.parametrize("plain", [False, True])
def test_leaving_a_loop_early_starts_the_next_epoch(tmp_path, plain):
    accelerate = require("accelerate")
    from fastguard.integrations.accelerate import guard

    model = new_model()
    accelerator = guard(accelerate.Accelerator(cpu=True), records=tmp_path / "records.jsonl")
    data = DataLoader([*batches()], batch_size=1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    if plain:
        model, optimizer = accelerator.prepare(model, inner)
    else:
        model, optimizer, data = accelerator.prepare(model, inner, data)
    for _ in range(2):
        for i, x in enumerate(data):
            accelerator.backward(loss_of(model, x[0]))
            optimizer.step()
            optimizer.zero_grad()
            if i == 1:
                break
    tags = [record.tag for record in read_records(tmp_path / "records.jsonl")]
    if plain:  # the guard does not see the epochs
        assert tags == [{"batch": i, "global_step": i + 1} for i in range(4)]
    else:
        assert [(t["epoch"], t["batch"]) for t in tags] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_second_optimizer_has_its_own_file(tmp_path):
    accelerate = require("accelerate")
    from fastguard.integrations.accelerate import guard

    accelerator = guard(accelerate.Accelerator(cpu=True), records=tmp_path / "records.jsonl")
    models = [new_model(), new_model()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    *models, first, second = accelerator.prepare(*models, *optimizers)
    for x in batches():
        accelerator.backward(loss_of(models[0], x))
        first.step()
    accelerator.backward(loss_of(models[1], batches()[0]))
    second.step()
    assert [r.step for r in read_records(tmp_path / "records.jsonl")] == [*range(1, 9)]
    assert [r.step for r in read_records(tmp_path / "records-1.jsonl")] == [1]
    assert fastguard("monitor", tmp_path, "--once").returncode == 0


@pytest.mark.parametrize("framework", ["huggingface", "accelerate", "fabric", "lightning"])
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"records": 7}, TypeError, "7 is not a path for records"),
        ({"records": "."}, IsADirectoryError, "'.' is a folder; name a file in it"),
        ({"records": "run/"}, IsADirectoryError, "'run/' is a folder; name a file in it"),
        ({"sinks": print}, TypeError, r"must be a list of sinks, such as \[print\]"),
        ({"sinks": ["records.jsonl"]}, TypeError, "sink='records.jsonl' must be callable"),
        ({"sinks": [dict]}, TypeError, "sink is the class dict"),
    ],
    ids=str,
)
def test_an_invalid_records_argument_is_refused_immediately(
    tmp_path, framework, options, error, message
):
    with pytest.raises(error, match=message):
        TRAINERS[framework](tmp_path, options)


def test_a_file_that_cannot_be_opened_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "run").write_text("a file, where a folder is wanted")
    with pytest.raises(OSError, match="run"):
        with_fabric(tmp_path, {"records": tmp_path / "run" / "records.jsonl"})


def test_a_tag_set_by_the_user_is_kept(tmp_path):
    lightning = require("lightning")
    from fastguard.integrations.lightning import GuardCallback

    class Manual(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = new_model()

        def training_step(self, batch, batch_idx):
            self.manual_backward(loss_of(self.net, batch))
            self.optimizers().step(tag=f"mine {batch_idx}", loss={"mine": math.pi})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = GuardCallback()
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Manual(), loader())  # fmt: skip
    records = callback.optimizers[0].records()
    assert [record.tag for record in records] == [f"mine {i}" for i in range(BATCHES)]
    assert all("mine" in record.losses for record in records)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_optimizers_count_their_own_batches(tmp_path, accumulate):
    """Both optimizers step on each batch, each with its own loss, as in a GAN."""
    lightning = require("lightning")
    from fastguard.integrations.lightning import GuardCallback

    class Two(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.nets = nn.ModuleList([new_model(), new_model()])

        def training_step(self, batch, batch_idx):
            for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
                self.manual_backward(loss_of(net, batch))
                if (batch_idx + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.1) for net in self.nets]

    lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        callbacks=[GuardCallback(records=tmp_path / "records.jsonl")],
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(Two(), loader())  # fmt: skip
    expected = [*range(BATCHES)] if accumulate == 1 else ["0-1", "2-3"]
    for name in ("records.jsonl", "records-1.jsonl"):
        records = list(read_records(tmp_path / name))
        assert [record.tag["batch"] for record in records] == expected


def test_spans_of_batches():
    span = BatchSpan()
    assert span.tag(1) == {"global_step": 1}  # no batch has begun yet
    span.begin(None, 4)
    span.add()
    assert span.tag(2) == {"batch": 4, "global_step": 2}
    span.clear()
    span.begin(1, 7)
    span.add()
    span.begin(2, 0)  # accumulation continues across the end of an epoch
    span.add()
    assert span.tag(3) == {"epoch": 2, "batch": "7-0", "global_step": 3}


def test_ultralytics_writes_to_the_given_path(tmp_path):
    require("ultralytics")
    from fastguard.integrations.ultralytics import guard
    from guardtest.detector import train

    path = tmp_path / "elsewhere" / "records.jsonl"
    trainer = train(tmp_path, lambda m: guard(m, records=path), n_train=4)
    assert not (Path(trainer.save_dir) / "records.jsonl").exists()
    assert places(read_records(path)) == [(1, 1, 1), (1, 2, 2)]
    assert RunRecords(path).records == path


def test_a_relative_path_is_resolved_when_it_is_given(tmp_path, monkeypatch):
    """The program changes its working directory before training begins, and before it resumes."""
    monkeypatch.chdir(tmp_path)
    run = RunRecords("run/records.jsonl")
    opt = GuardedOptimizer(torch.optim.SGD(new_model().parameters(), lr=0.1))
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        run.begin([opt], writes=True)
        opt.step(tag=folder)
        run.end()
    records = read_records(tmp_path / "run" / "records.jsonl", strict=True)
    assert [r.tag for r in records] == ["first", "second"]
