"""Incident A, a detector with NaN in epoch 3: the unguarded run, then the guarded run."""

from __future__ import annotations

import math

import pytest

from fastguard import read_records
from fastguard.commands.cli import main
from fastguard.commands.demo.incidents import detector
from fastguard.commands.demo.incidents.detector import BATCHES, FAULTS
from fastguard.integrations.shared import guarded
from fastguard.integrations.ultralytics import callbacks
from guardtest import require

LETTER = "A"
require("ultralytics")
for package in ("rich", "matplotlib"):
    require(package)
BAD = [BATCHES * (epoch - 1) + batch for epoch, batch in FAULTS]  # step numbers, counted from 1


# The unguarded run.


def test_two_bad_batches_ruin_the_unguarded_run(as_it_was):
    facts = as_it_was.facts
    assert not as_it_was.survived
    assert not any(facts[part] for part in ("weights", "statistics", "ema", "momenta"))
    assert facts["epochs"] == (
        1,
        2,
        3,
        3,
        3,
        3,
    )  # the trainer's recovery reaches the same batches again
    assert "NaN persisted" in facts["error"]


def test_every_loss_after_the_first_bad_batch_is_nan(as_it_was):
    first = BAD[0]
    assert all(map(math.isfinite, as_it_was.losses[: first - 1]))
    assert not any(map(math.isfinite, as_it_was.losses[first - 1 : 3 * BATCHES]))


# The guarded run.


def test_the_guarded_run_trains_to_the_end(guarded):
    facts = guarded.facts
    assert guarded.survived
    assert (facts["error"], facts["epochs"]) == (None, (1, 2, 3, 4))
    assert all(facts[part] for part in ("weights", "statistics", "ema", "momenta"))
    assert facts["ema_updates"] == 4 * BATCHES - len(BAD)
    assert [i for i, v in enumerate(guarded.losses, 1) if not math.isfinite(v)] == BAD


def test_the_trainers_own_log_has_no_nan(folder):
    _, *rows = (folder / "guarded" / "run" / "results.csv").read_text().splitlines()
    assert len(rows) == 4
    assert all(math.isfinite(float(v)) for row in rows for v in row.split(","))


def test_both_runs_are_identical_until_the_first_bad_batch(as_it_was, guarded):
    assert guarded.losses[: BAD[0] - 1] == as_it_was.losses[: BAD[0] - 1]


def test_the_records_name_batch_loss_part_parameter_and_image(guarded, folder):
    overflow, pixel = (r for r in guarded.records if r.action == "skipped")
    assert [(r.tag["epoch"], r.tag["batch"]) for r in (overflow, pixel)] == list(FAULTS)
    assert [k for k, v in overflow.losses.items() if math.isnan(v)] == ["cls_loss"]
    assert all(map(math.isnan, pixel.losses.values()))
    assert overflow.culprits[0][0] == "model.0.conv.weight"
    assert overflow.n_culprits < pixel.n_culprits  # the box branch was clean
    assert all(name.startswith(str(folder)) for name in pixel.tag["images"])
    assert [repr(r) for r in read_records(folder / "records.jsonl")] == list(
        map(repr, guarded.records)
    )


def test_each_param_group_has_its_own_warmup_of_rate_and_momentum(guarded):
    lr, momentum = guarded.facts["lr"], guarded.facts["momentum"]
    bias = [rates["bias"] for rates in lr[:BATCHES]]
    weight = [rates["weight"] for rates in lr[:BATCHES]]
    assert (bias[0], weight[0], momentum[0]["weight"]) == (0.05, 0.0, 0.8)
    assert bias == sorted(bias, reverse=True) and weight == sorted(weight)
    assert momentum[BATCHES]["weight"] == 0.937


def test_the_learning_rate_backs_off_and_recovers(guarded):
    rates = {record.step: record.lr for record in guarded.records}
    first, second = BAD
    after = [rates[first + n] / rates[first] for n in (1, 20, 21)]
    assert after == pytest.approx([0.5, 0.5, 1.0])
    assert rates[second + 1] == rates[second] / 2
    fourth_epoch = 3 * BATCHES
    assert rates[fourth_epoch + 1] * 2 == pytest.approx(rates[fourth_epoch + BATCHES])


def test_checkpoints_are_clean(folder, capsys):
    files = sorted((folder / "guarded" / "run" / "weights").glob("*.pt"))
    assert {file.name for file in files} >= {"last.pt", "best.pt", "epoch2.pt"}
    assert main(["ckpt", "verify", *map(str, files)]) == 0
    assert capsys.readouterr().out.count("all finite") == len(files)


def test_monitor_names_the_epoch_and_batch_of_each_fault(folder, capsys):
    assert main(["monitor", "--once", str(folder / "guarded" / "run")]) == 1
    printed = capsys.readouterr().out
    assert "2 incidents" in printed and "cls_loss=nan" in printed
    for epoch, batch in FAULTS:
        assert f"'epoch': {epoch}, 'batch': {batch}" in printed


def test_the_picture_is_written(folder):
    assert (folder / "incident.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# Each mechanism is needed: without it, the guarded run fails.


def test_without_skipping_the_weights_are_lost(monkeypatch, tmp_path):
    def applying(optimizer, model, options, **of_trainer):
        return guarded(optimizer, model, {**options, "nonfinite": "propagate"}, **of_trainer)

    monkeypatch.setattr(callbacks, "guarded", applying)
    outcome = detector.run(tmp_path, guarded=True)
    assert not outcome.survived and not outcome.facts["weights"]


def test_without_protected_buffers_the_averages_are_lost(monkeypatch, tmp_path):
    monkeypatch.setattr(callbacks.ModelBuffers, "follow", lambda *_: None)
    outcome = detector.run(tmp_path, guarded=True)
    assert outcome.facts["weights"]
    assert not outcome.survived and not outcome.facts["statistics"] and not outcome.facts["ema"]


def test_without_backoff_the_learning_rate_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(detector, "BACKOFF", {})
    monkeypatch.setitem(detector.SETTINGS, "epochs", 3)
    rates = {r.step: r.lr for r in detector.run(tmp_path, guarded=True).records}
    assert rates[BAD[0] + 1] == rates[BAD[0]]
