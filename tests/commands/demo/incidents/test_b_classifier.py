"""B. The checkpoint that could not be trusted: the original run, then the guarded run."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastguard import CheckpointStore
from fastguard.checkpoints.entry import Entry
from fastguard.commands.cli import main
from fastguard.commands.demo.incidents import classifier
from fastguard.commands.demo.incidents.classifier import (
    BATCHES,
    EPOCHS,
    FAULTS,
    FROZEN_FROM,
    LR,
    Guarded,
)
from fastguard.commands.demo.incidents.classifier_data import Kind
from fastguard.recovery.incident_log import IncidentLog
from guardtest import require
from guardtest.incidents import assert_shown
from guardtest.training import assert_same_bits

LETTER = "B"
for package in ("rich", "matplotlib", "plotly"):
    require(package)
# Numbers within the whole run, counted from 1.
BAD = [BATCHES * (epoch - 1) + batch for epoch, batch in FAULTS]
STATISTICS = ("model.bn.running_mean", "model.bn.running_var")


# The original run.


def test_finite_losses_hide_the_bad_statistics(as_it_was):
    fourth = as_it_was.losses[3 * BATCHES : 4 * BATCHES]
    assert all(map(math.isfinite, fourth)) and max(fourth) < 1.0
    frozen = as_it_was.losses[(FROZEN_FROM - 1) * BATCHES :]
    assert len(frozen) == 2 * BATCHES and all(map(math.isnan, frozen))
    assert not as_it_was.survived and as_it_was.facts["accuracy"] < 0.4


def test_last_and_best_contain_nan_although_their_losses_were_finite(as_it_was):
    bad = {name for name, tensors in as_it_was.facts["files"].items() if tensors}
    assert bad == {"last.pt", "best.pt", "epoch4.pt", "epoch6.pt"}
    for name in bad:
        assert as_it_was.facts["files"][name][:2] == STATISTICS


# The guarded run: a rollback without a restart.


def test_the_guarded_run_rolls_back_and_finishes(guarded):
    facts = guarded.facts
    assert guarded.survived and facts["accuracy"] > 0.8
    assert [i for i, loss in enumerate(guarded.losses, 1) if math.isnan(loss)] == [
        BAD[0],
        BAD[1] + facts["redone"][0] - 1,  # the first bad batch is not repeated
    ]
    for rewind, redone, bad in zip(facts["rewinds"], facts["redone"], BAD, strict=True):
        assert rewind.position == bad - redone
        assert 0 < redone <= classifier.ROLLBACK["every"] + 1
    assert max(facts["seconds"]) < 5.0


def test_a_rollback_lowers_the_learning_rate(guarded):
    assert guarded.facts["lr"] == [LR / 2, LR / 4]
    assert [r.lr for r in guarded.records if r.action == "skipped"] == [LR, LR / 2]
    assert guarded.records[-1].lr == LR / 4


def test_only_the_bad_batches_are_left_out(guarded):
    assert [rewind.skip for rewind in guarded.facts["rewinds"]] == [(bad,) for bad in BAD]
    times_seen = {}
    for record in guarded.records:
        place = (record.tag["epoch"], record.tag["batch"])
        times_seen[place] = times_seen.get(place, 0) + 1
    assert len(times_seen) == EPOCHS * BATCHES
    assert [times_seen[place] for place in FAULTS] == [1, 1]
    assert sum(times_seen.values()) == EPOCHS * BATCHES + sum(guarded.facts["redone"]) - 2


def test_the_run_gives_up_after_max_attempts(monkeypatch, tmp_path):
    corrupt = {(3, batch): Kind.BAD_PIXEL for batch in range(15, BATCHES + 1)}
    monkeypatch.setattr(classifier, "FAULTS", corrupt)
    outcome = classifier.run(tmp_path, guarded=True)
    error = outcome.facts["error"]
    assert error.startswith("at step ") and ", a step was skipped; " in error
    assert "3 rollbacks did not solve the problem" in error
    assert "'epoch': 3, 'batch': 18" in error and "conv.weight (72 NaN)" in error
    assert [r.skip for r in outcome.facts["rewinds"]] == [(111,), (111, 112), (111, 112, 113)]
    assert [r.attempt for r in outcome.facts["rewinds"]] == [1, 2, 3]
    # The last checkpoint contains the last good state.
    assert outcome.facts["last"].startswith("step-000000096") and outcome.facts["accuracy"] > 0.8
    assert all(entry.clean for entry in outcome.facts["entries"])


# Each checkpoint has a verdict.


def test_each_checkpoint_has_a_verdict_an_epoch_and_a_metric(guarded, folder):
    entries = guarded.facts["entries"]
    assert [(e.step, e.epoch) for e in entries] == [(240, 5), (288, 6)]
    for entry in entries:
        assert entry.clean and entry.finite and entry.verified and len(entry.sha256) == 64
        assert 0.0 < entry.metric < 1.0
    manifest = json.loads((folder / "guarded/checkpoints/manifest.json").read_text())
    kept = ("epoch", "metric", "incidents", "bad", "sha256", "verified")
    assert all(set(kept) <= set(entry) for entry in manifest["checkpoints"])


@pytest.fixture(scope="module")
def without_rollback(tmp_path_factory):
    """The guarded run with `keep=1`, no rollback, and wrong labels in epoch 2."""
    folder = tmp_path_factory.mktemp("without_rollback")
    worse = {(2, batch): Kind.MISLABELED for batch in range(40, BATCHES + 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(classifier.ROLLBACK, "after_skips", None)
        patch.setitem(classifier.STORE, "keep", 1)
        patch.setattr(classifier, "FAULTS", {**FAULTS, **worse})
        return folder, classifier.run(folder, guarded=True)


def test_without_rollback_the_statistics_become_nan(without_rollback):
    _, outcome = without_rollback
    assert not outcome.survived
    assert all(map(math.isnan, outcome.losses[(FROZEN_FROM - 1) * BATCHES :]))


def test_the_last_clean_and_the_best_checkpoint_are_kept(without_rollback):
    folder, _ = without_rollback
    with CheckpointStore(folder / "checkpoints", read_only=True) as store:
        assert [entry.epoch for entry in store.list()] == [1, 2, 6]  # keep=1
        assert (store.best().epoch, store.last_clean().epoch, store.last().epoch) == (1, 2, 6)
        assert store.best().metric < store.last_clean().metric < math.inf
        last = store.last()
    assert tuple(name for name, *_ in last.bad)[:2] == STATISTICS
    # Two bad batches, then two epochs in which every step was skipped.
    assert last.incidents == 2 + 2 * BATCHES
    assert "loss=nan" in last.notes[-1]


@pytest.fixture
def store(without_rollback, tmp_path):
    return shutil.copytree(without_rollback[0] / "checkpoints", tmp_path / "checkpoints")


def test_the_command_lists_verifies_and_rolls_back(store, capsys):
    assert main(["ckpt", "list", str(store)]) == 0
    _, best, clean, last = capsys.readouterr().out.splitlines()
    assert best.split()[:2] == ["48", "1"] and " best " in best
    assert clean.split()[:2] == ["96", "2"] and " last-clean " in clean
    assert last.split()[:2] == ["288", "6"] and "NOT FINITE" in last

    assert main(["ckpt", "verify", str(store)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("all finite") == 2 and "model.bn.running_mean (8 NaN)" in printed

    assert main(["ckpt", "rollback", str(store)]) == 0
    assert "training resumes after step-000000096" in capsys.readouterr().out
    assert main(["ckpt", "verify", str(store)]) == 0
    with CheckpointStore(store, read_only=True) as opened:
        assert (opened.last().step, opened.last().epoch) == (96, 2)
        (backup,) = opened.replaced()
        assert backup.epoch == 6 and (store / f"{backup.file}.replaced").exists()


def test_after_the_command_the_run_resumes_at_the_right_batch(store, monkeypatch, capsys):
    assert main(["ckpt", "rollback", str(store)]) == 0
    outcome = classifier.run(store.parent, guarded=True)
    assert outcome.survived
    first = outcome.records[0]
    assert first.tag == {"epoch": 3, "batch": 1} and first.step == 2 * BATCHES + 1
    # The rollback does not go further back.
    assert outcome.facts["rewinds"][0].position == 2 * BATCHES
    assert [entry.epoch for entry in outcome.facts["entries"]][-2:] == [5, 6]


# The files of the original run.


@pytest.fixture
def files(folder, tmp_path):
    return shutil.copytree(folder / "as-it-was", tmp_path / "as-it-was")


def test_pickled_modules_ema_and_optimizer_are_verified_by_name(files, capsys):
    assert main(["ckpt", "verify", str(files)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("\nBAD") + printed.startswith("BAD") == 4
    assert f"ok   {files / 'epoch2.pt'}" in printed
    for tensor in (*STATISTICS, "ema.bn.running_mean", "ema.bn.running_var"):
        assert printed.count(f"{tensor} (8 NaN)") == 4

    content = torch.load(files / "epoch2.pt", weights_only=False)
    content["optimizer"]["state"][2]["momentum_buffer"][0] = math.inf
    torch.save({"run": [{"nested": content}]}, files / "other.pt")
    assert main(["ckpt", "verify", str(files / "other.pt")]) == 1
    printed = capsys.readouterr().out
    assert "run.0.nested.optimizer.state.2.momentum_buffer (1 +Inf)" in printed


def test_the_manual_plan_is_one_command(files, capsys, monkeypatch):
    bad, good = (files / "last.pt").read_bytes(), (files / "epoch2.pt").read_bytes()
    assert main(["ckpt", "rollback", str(files)]) == 0
    printed = capsys.readouterr().out
    assert "passed over best.pt: 4 tensors are not finite, first model.bn.running_mean" in printed
    assert (files / "last.pt").read_bytes() == good
    assert (files / "last.pt.replaced-1").read_bytes() == bad  # the backup

    # The epoch to resume from is stored in the file.
    monkeypatch.setattr(classifier, "FAULTS", {})  # the two images were repaired
    outcome = classifier.run(files, guarded=False)
    assert outcome.survived
    assert len(outcome.losses) == (EPOCHS - 2) * BATCHES


def test_the_manual_plan_would_have_failed(files, monkeypatch):
    shutil.copy(files / "best.pt", files / "last.pt")
    monkeypatch.setattr(classifier, "FAULTS", {})
    assert not classifier.run(files, guarded=False).survived


# Signals.


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs ended by a signal in epoch 5: their folder, exit statuses, and the batch."""
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("killed_classifier.py")
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return folder, result["statuses"], result["batch"]


def test_sigterm_loses_the_epoch_of_the_original_run(killed):
    folder, statuses, _ = killed
    assert statuses["as-it-was"] == -15
    assert torch.load(folder / "as-it-was/last.pt", weights_only=False)["epoch"] == 4


def test_sigterm_ends_the_guarded_run_with_a_verified_checkpoint(killed):
    folder, statuses, batch = killed
    assert statuses["terminated"] == 128 + 15
    with CheckpointStore(folder / "terminated/checkpoints", read_only=True) as store:
        last = store.last()
        assert (last.step, last.epoch, last.metric) == (batch, 4, None)
        assert last.clean and all(check.ok for check in store.verify())


def test_kill_leaves_a_store_with_the_last_epoch(killed):
    folder, statuses, _ = killed
    assert statuses["killed"] == -9
    with CheckpointStore(folder / "killed/checkpoints") as store:
        assert store.last_clean() == store.last()
        assert (store.last().step, store.last().epoch) == (4 * BATCHES, 4)
        assert all(check.ok for check in store.verify())


@pytest.mark.parametrize("name", ["terminated", "killed"])
def test_a_run_ended_by_a_signal_resumes_exactly(name, killed, folder, tmp_path):
    work = shutil.copytree(killed[0] / name, tmp_path / name)
    assert classifier.run(work, guarded=True).survived
    weights = []
    for store in (work / "checkpoints", folder / "guarded" / "checkpoints"):
        with CheckpointStore(store, read_only=True) as opened:
            state = opened.load("last").state
            weights.append({**state["model"], **state["ema"]})
    assert_same_bits(*weights)


# The files of the demo.


def test_the_demo_writes_picture_report_and_records(folder):
    assert_shown(folder)
    assert main(["ckpt", "verify", str(folder / "guarded" / "checkpoints")]) == 0


# Each mechanism is needed: without it, the guarded run fails.


def test_without_skipping_the_weights_are_lost(monkeypatch, tmp_path):
    class Propagating(classifier.GuardedOptimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, nonfinite="propagate")

    monkeypatch.setattr(classifier, "GuardedOptimizer", Propagating)
    outcome = classifier.run(tmp_path, guarded=True)
    assert not outcome.survived
    assert "model.conv.weight" in [name for name, *_ in outcome.facts["entries"][-1].bad]


def test_without_leaving_out_the_bad_batch_the_run_gives_up(monkeypatch, tmp_path):
    monkeypatch.setattr(IncidentLog, "positions_since", lambda *_: ())
    outcome = classifier.run(tmp_path, guarded=True)
    assert not outcome.survived
    assert "3 rollbacks did not solve the problem" in outcome.facts["error"]
    assert [rewind.position for rewind in outcome.facts["rewinds"]] == [100] * 3


def test_without_lr_factor_the_learning_rate_is_not_lowered(monkeypatch, tmp_path):
    monkeypatch.setitem(classifier.ROLLBACK, "lr_factor", 1.0)
    monkeypatch.setattr(classifier, "EPOCHS", 3)
    assert classifier.run(tmp_path, guarded=True).facts["lr"] == [LR, LR]


def test_without_a_verdict_no_clean_checkpoint_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(Entry, "clean", property(lambda entry: entry.verified))
    monkeypatch.setitem(classifier.ROLLBACK, "after_skips", None)
    monkeypatch.setitem(classifier.STORE, "keep", 1)
    monkeypatch.setattr(classifier, "FAULTS", {(2, 7): Kind.BAD_PIXEL})
    monkeypatch.setattr(classifier, "EPOCHS", 3)
    monkeypatch.setattr(Guarded, "validate", lambda self: {"loss": None, "accuracy": 0.0})
    entries = classifier.run(tmp_path, guarded=True).facts["entries"]
    assert [entry.epoch for entry in entries] == [3]
    assert entries[0].bad
