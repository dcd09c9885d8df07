"""`fastguard.integrations.ultralytics` in the real trainer: a tiny detector on synthetic images."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastguard import Replicated, TrainingDivergedError, Warmup, read_records
from fastguard.commands.demo.incidents.detector_faults import Faults, Kind
from fastguard.integrations.ultralytics import guard
from guardtest import require
from guardtest.detector import left_out, state_of, train
from guardtest.gloo_groups import group_of_one
from guardtest.training import assert_same_bits

YOLO = require("ultralytics").YOLO
load_checkpoint = require("ultralytics.nn.tasks").load_checkpoint

BAD = {
    (1, 2): Kind.OVERFLOW,
    (1, 5): Kind.BAD_PIXEL,
    (2, 8): Kind.BAD_PIXEL,
}  # the last batch of its epoch


@pytest.fixture(params=["fp32", "bf16", "scaled"])
def precision(request, monkeypatch) -> dict[str, Any]:
    """Settings of the trainer, which supports half precision only on GPUs.

    Its autocast is replaced with torch's autocast for the CPU. For "scaled", its disabled
    GradScaler is replaced with an enabled one.
    """
    if request.param == "fp32":
        return {}
    monkeypatch.setattr(
        "ultralytics.engine.trainer.autocast",
        lambda enabled, device: torch.autocast("cpu", torch.bfloat16),
    )
    if request.param == "scaled":
        scaler = torch.amp.GradScaler
        monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu"))
    return {"amp": "bf16"}


def with_faults(at=BAD):
    return Faults(at).attach


def test_a_run_without_faults_matches_the_unguarded_trainer_bit_for_bit(tmp_path, precision):
    guarded: list[Any] = []
    ours = train(tmp_path, lambda m: guarded.append(guard(m)), epochs=2, **precision)
    theirs = train(tmp_path, epochs=2, exist_ok=True, **precision)
    assert_same_bits(state_of(ours), state_of(theirs))
    records = list(read_records(ours.save_dir / "records.jsonl"))
    assert [r.action for r in records] == ["applied"] * 16
    assert guarded[0].optimizer.applied_steps == 16


def test_a_clipped_run_matches_the_unguarded_trainer_within_rounding(tmp_path):
    gains = {"box": 750.0, "cls": 50.0, "lr0": 0.001}  # norms far above 10
    ours = train(tmp_path, guard, n_train=4, **gains)
    theirs = train(tmp_path, n_train=4, exist_ok=True, **gains)
    records = list(read_records(ours.save_dir / "records.jsonl"))
    assert {r.action for r in records} == {"clipped"}
    expected = state_of(theirs)
    for name, value in state_of(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_the_fixed_limit_is_replaced(tmp_path):
    trainer = train(tmp_path, lambda m: guard(m, max_norm=0.01))
    records = list(read_records(trainer.save_dir / "records.jsonl"))
    assert all(r.clip_coef == pytest.approx(0.01 / r.total_norm, rel=1e-3) for r in records)


def test_a_run_with_bad_batches_ends_like_a_run_without_them(tmp_path, precision):
    """Weights, BatchNorm statistics, momenta, EMA and its counter are equal bit for bit."""
    ours = train(tmp_path, with_faults(), guard, epochs=2, **precision)
    theirs = train(tmp_path, left_out(BAD), epochs=2, exist_ok=True, **precision)
    assert_same_bits(state_of(ours), state_of(theirs))
    assert ours.ema.updates == 16 - len(BAD)


@pytest.mark.parametrize("kind", Kind, ids=[k.name.lower() for k in Kind])
def test_without_the_guard_a_bad_batch_spoils_every_average(tmp_path, kind):
    trainer = train(tmp_path, with_faults({(1, 2): kind}))
    state = state_of(trainer)
    for part in ("model.", "ema.", "optimizer."):
        assert any(not v.isfinite().all() for k, v in state.items() if k.startswith(part))


def test_a_window_of_batches_is_skipped_as_one(tmp_path):
    ours = train(tmp_path, with_faults({(1, 3): Kind.BAD_PIXEL}), guard, nbs=4)
    theirs = train(tmp_path, left_out([(1, 3), (1, 4)]), nbs=4, exist_ok=True)
    assert_same_bits(state_of(ours), state_of(theirs))
    records = list(read_records(ours.save_dir / "records.jsonl"))
    assert [r.action for r in records] == ["applied", "skipped", "applied", "applied"]
    assert records[1].tag["batch"] == "3-4"
    assert len(records[1].tag["images"]) == 4


def test_records_name_the_batch_the_loss_and_the_parameter(tmp_path):
    seen = []
    trainer = train(tmp_path, with_faults(), lambda m: guard(m, sinks=[seen.append]), epochs=2)
    records = list(read_records(trainer.save_dir / "records.jsonl"))
    assert list(map(repr, records)) == list(map(repr, seen))
    skipped = [r for r in records if r.action == "skipped"]
    assert [(r.tag["epoch"], r.tag["batch"]) for r in skipped] == list(BAD)
    overflow, pixel, _ = skipped
    bad_parts = [k for k, v in overflow.losses.items() if v != v]
    assert bad_parts == ["cls_loss"] and len(overflow.losses) == 3
    assert "model.0.conv.weight" in [name for name, *_ in pixel.culprits]
    assert all(Path(name).is_file() for name in pixel.tag["images"])


def test_the_means_of_an_epoch_exclude_bad_batches(tmp_path):
    trainer = train(tmp_path, with_faults({(1, 1): Kind.BAD_PIXEL, (1, 8): Kind.BAD_PIXEL}), guard)
    header, row = (line.split(",") for line in trainer.csv.read_text().splitlines()[:2])
    train_losses = [float(v) for k, v in zip(header, row, strict=True) if k.startswith("train/")]
    assert len(train_losses) == 3 and all(0 < loss < 100 for loss in train_losses)


def test_a_bad_last_batch_does_not_start_the_trainers_recovery(tmp_path):
    epochs = []

    def count(model):
        model.add_callback("on_train_epoch_start", lambda trainer: epochs.append(trainer.epoch))

    train(tmp_path, with_faults(), guard, count, epochs=3)
    assert epochs == [0, 1, 2]


def destroy_weights(model, epochs, before_batch):
    """A callback that appends to `epochs` and makes a weight NaN in the second epoch."""
    batches = []

    def on_train_epoch_start(trainer):
        epochs.append(trainer.epoch)
        batches.clear()

    def on_train_batch_start(trainer):
        batches.append(trainer)
        if epochs == [0, 1] and len(batches) == before_batch:
            next(trainer.model.parameters()).data[0] = torch.nan

    model.add_callback("on_train_epoch_start", on_train_epoch_start)
    model.add_callback("on_train_batch_start", on_train_batch_start)


def test_the_trainers_own_recovery_still_works(tmp_path):
    """The trainer restores weights that became NaN outside a guarded step."""
    epochs = []

    trainer = train(
        tmp_path,
        with_faults({(2, 4): Kind.BAD_PIXEL}),
        guard,
        lambda m: destroy_weights(m, epochs, before_batch=3),
        epochs=3,
    )
    assert epochs == [0, 1, 1, 2]
    state = state_of(trainer)
    assert all(v.isfinite().all() for v in state.values())
    records = list(read_records(trainer.save_dir / "records.jsonl"))
    assert [r.action for r in records[8:16]] == ["applied"] * 2 + ["skipped"] * 6
    again = records[16:24]  # the repeated epoch, including its fault
    assert [r.action for r in again] == ["applied"] * 3 + ["skipped"] + ["applied"] * 4
    # The counters of the guard were restored too.
    assert [r.step for r in again] == list(range(9, 17))


def test_a_recovery_starts_a_new_window_of_batches(tmp_path):
    seen = []
    train(
        tmp_path,
        lambda m: guard(m, sinks=[seen.append]),
        lambda m: destroy_weights(m, [], before_batch=1),
        n_train=10,
        nbs=8,  # four batches per step, five per epoch: the rest is accumulated in the next epoch
        epochs=2,
    )
    first_again = [r for r in seen if r.action != "skipped"][1]
    assert first_again.tag == {"epoch": 2, "batch": 1, "global_step": 2}


def test_statistics_that_overflow_without_a_nan_do_not_reach_the_ema(tmp_path):
    """With 1e30 in one pixel, loss and gradients are finite but BatchNorm's variance is not."""

    def bright_pixel(model):
        def on_pretrain_routine_end(trainer):
            preprocess = trainer.preprocess_batch

            def bright(batch):
                batch = preprocess(batch)
                batch["img"][0, 0, 3, 3] = 1e30
                return batch

            trainer.preprocess_batch = bright

        model.add_callback("on_pretrain_routine_end", on_pretrain_routine_end)

    plain = state_of(train(tmp_path, bright_pixel))
    assert any(not v.isfinite().all() for k, v in plain.items() if k.startswith("ema."))
    trainer = train(tmp_path, guard, bright_pixel, exist_ok=True)
    assert all(v.isfinite().all() for v in state_of(trainer).values())
    assert {r.action for r in read_records(trainer.save_dir / "records.jsonl")} <= {
        "applied",
        "clipped",
    }


def test_the_guard_of_a_data_parallel_trainer_uses_its_group(tmp_path):
    """The trainer supports data parallelism on GPUs only, so the process group has one rank."""

    def on_pretrain_routine_end(trainer):
        trainer.world_size = 2

    guarded = []
    with group_of_one():
        train(
            tmp_path,
            with_faults(),
            lambda m: m.add_callback("on_pretrain_routine_end", on_pretrain_routine_end),
            lambda m: guarded.append(guard(m)),
        )
    assert isinstance(guarded[0].optimizer.group, Replicated)
    assert guarded[0].optimizer.skipped_steps == 2


def test_checkpoints_are_always_finite(tmp_path):
    trainer = train(tmp_path, with_faults(), guard, epochs=3, save_period=1)
    saved = sorted(trainer.wdir.glob("*.pt"))
    assert {p.name for p in saved} >= {"last.pt", "epoch0.pt", "epoch1.pt"}
    for path in saved:
        checkpoint = load_checkpoint(path)[1]
        model = checkpoint["ema"] or checkpoint["model"]
        assert all(v.isfinite().all() for v in model.state_dict().values())
        if checkpoint["optimizer"]:
            states = checkpoint["optimizer"]["state"].values()
            assert all(s["momentum_buffer"].isfinite().all() for s in states)


def test_a_resumed_run_continues_counters_and_backoff(tmp_path, recwarn):
    schedule = {"backoff": 0.5}
    train(
        tmp_path,
        with_faults({(1, 2): Kind.BAD_PIXEL}),
        lambda m: guard(m, schedule=schedule),
        epochs=3,
        save_period=1,
    )
    model = YOLO(tmp_path / "run" / "weights" / "epoch1.pt")
    guarded = guard(model, schedule=schedule)
    model.train(resume=True)
    assert guarded.optimizer.steps_taken == 3 * 8
    assert (guarded.optimizer.applied_steps, guarded.optimizer.skipped_steps) == (23, 1)
    assert guarded.lr.backoff_factor == 0.5
    assert not [w for w in recwarn if "guard" in str(w.message)]


def rates(watched: list[dict[str, tuple[float, float]]]):
    """Appends learning rate and momentum of each param group at each applied step."""

    def attach(model):
        def on_train_start(trainer):
            inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            inner.register_step_pre_hook(
                lambda opt, *_: watched.append(
                    {g["param_group"]: (g["lr"], g["momentum"]) for g in opt.param_groups}
                )
            )

        model.add_callback("on_train_start", on_train_start)

    return attach


def test_the_trainers_own_warmup_is_not_changed(tmp_path):
    warmup = {"epochs": 2, "warmup_epochs": 1, "warmup_bias_lr": 0.1, "warmup_momentum": 0.8}
    ours, theirs = [], []
    train(tmp_path, guard, rates(ours), **warmup)
    train(tmp_path, rates(theirs), exist_ok=True, **warmup)
    assert ours == theirs
    assert ours[0] == {"bias": (0.1, 0.8), "weight": (0.0, 0.8), "bn": (0.0, 0.8)}


def test_the_guards_warmup_counts_applied_steps_in_each_group(tmp_path):
    watched = []
    warmup = Warmup(steps=4, lr=(0.0, 0.0, 0.1), momentum=0.5)
    train(
        tmp_path,
        with_faults({(1, 2): Kind.BAD_PIXEL}),
        lambda m: guard(m, schedule={"warmup": warmup}),
        rates(watched),
        lrf=1.0,
        momentum=0.9,
    )
    assert [w["weight"][0] for w in watched[:5]] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert [w["bias"][0] for w in watched[:5]] == pytest.approx([0.1, 0.0775, 0.055, 0.0325, 0.01])
    assert [w["bn"][1] for w in watched[:5]] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])


def test_the_learning_rate_backs_off_and_recovers(tmp_path):
    watched = []
    train(
        tmp_path,
        with_faults({(1, 2): Kind.BAD_PIXEL}),
        lambda m: guard(m, schedule={"backoff": 0.5, "recovery": 3, "floor": 0.006}),
        rates(watched),
        lrf=1.0,
    )
    assert [w["weight"][0] for w in watched] == pytest.approx([0.01, *[0.006] * 3, *[0.01] * 3])


def test_too_many_skips_end_the_run_with_their_records_written(tmp_path):
    faults = {(1, batch): Kind.BAD_PIXEL for batch in range(3, 9)}
    with pytest.raises(TrainingDivergedError, match="max_consecutive_skips=2"):
        train(tmp_path, with_faults(faults), lambda m: guard(m, max_consecutive_skips=2))
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    _, *records = map(json.loads, lines)  # the first line is the header
    assert [record["action"] for record in records] == ["applied"] * 2 + ["skipped"] * 3


def test_the_callbacks_can_be_pickled(tmp_path):
    """The trainer pickles them for its worker processes."""
    model = YOLO("yolo11n.yaml")
    guard(model, max_norm=3.0, records=tmp_path / "records.jsonl", sinks=[print])
    copies = pickle.loads(pickle.dumps(model.callbacks["on_pretrain_routine_end"]))
    guarded = copies[-1].__self__
    assert guarded._options["max_norm"] == 3.0
    assert (guarded._records.records, guarded._records.sinks) == (
        tmp_path / "records.jsonl",
        (print,),
    )


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="must be an ultralytics model"):
        guard(torch.nn.Linear(2, 2))
    model = YOLO("yolo11n.yaml")
    guard(model)
    with pytest.raises(ValueError, match="already guarded"):
        guard(model)


def test_a_missing_ultralytics_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics.engine.model", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch-fastguard\[ultralytics\]"):
        guard(None)
