"""D. The model that could not learn: the original run, its diagnosis, and the repaired run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastguard import diagnose
from fastguard.commands.cli import main
from fastguard.commands.demo.incidents import adaptive_stream
from fastguard.commands.demo.incidents.adaptive_stream import BATCHES, FAULTS, PATIENCE, Guarded
from fastguard.commands.demo.incidents.adaptive_stream_data import SIZE, Kind, draw
from fastguard.commands.demo.incidents.adaptive_stream_model import (
    Attention,
    as_it_was,
    losses,
    repaired,
)
from fastguard.diagnosis.batch_check import read_batch
from guardtest import require
from guardtest.incidents import assert_recorded, assert_shown

LETTER = "D"
for package in ("rich", "matplotlib", "plotly"):
    require(package)
BATCH_OF = {fault: number for number, fault in FAULTS.items()}
DEAD, SWAPPED, SIXTEEN = (
    BATCH_OF[kind] for kind in (Kind.DEAD_PIXEL, Kind.SWAPPED_BYTES, Kind.SIXTEEN_BITS)
)
SPEC = "fastguard.commands.demo.incidents.adaptive_stream:make"

EXPECTED = [  # the findings that must be reported, in this order
    ("shape-mismatch", "mask"),
    ("lr-vanished", "param group 0"),
    ("nonfinite-activation", "attention (Attention)"),
    ("nonfinite-activation", "encoder.0 (Conv2d)"),
    ("no-gradient", "boundary.weight"),
    ("nonfinite-data", "inputs"),
    ("extreme-gain", "boundary (Conv2d)"),
    ("range", "inputs"),
]


def record_of(outcome, batch):
    """The record of a batch."""
    (record,) = (r for r in outcome.records if r.tag == {"batch": batch})
    return record


# The original run.


def test_the_original_run_learns_nothing(as_it_was):
    facts = as_it_was.facts
    assert not as_it_was.survived
    assert (facts["iou"], facts["accuracy"]) == (0.0, 0.0)
    assert (facts["steps"], facts["weights"]) == (0, True)
    assert facts["parts"]["mask"] == math.inf and math.isnan(facts["parts"]["label"])


def test_every_batch_is_nan_until_the_run_is_stopped_early(as_it_was):
    assert len(as_it_was.losses) == PATIENCE < BATCHES
    assert all(map(math.isnan, as_it_was.losses))


def test_the_learning_rate_vanishes(as_it_was):
    assert f"{as_it_was.facts['lr'][-1]:.2e}" == "8.88e-21"


# The diagnosis.


def test_all_faults_are_reported_in_order_of_importance(guarded):
    found = guarded.facts["found"]
    reported = [(f.kind, f.where) for f in found.at_least("warning")]
    assert [finding for finding in reported if finding in EXPECTED] == EXPECTED
    assert reported[:3] == EXPECTED[:3]
    assert found.seconds < 60


def test_each_finding_has_a_remedy_and_the_numbers(guarded):
    found = guarded.facts["found"]
    assert all(f.remedy for f in found.at_least("warning"))
    (shape,) = found.of("shape-mismatch")
    assert "[4, 1, 32, 32] and target [4, 1, 224, 224]" in shape.seen
    (lr,) = found.of("lr-vanished")
    assert "8.88e-21" in lr.seen and "started at 1e-05" in lr.seen and "GuardedLR" in lr.remedy
    division, of_the_batch = found.of("nonfinite-activation")
    assert "aten.div.Tensor" in division.seen and "denominators are exactly 0" in division.seen
    assert "eps" in division.remedy
    assert "the batch value batch[0] was already non-finite" in of_the_batch.seen
    assert "boundary.weight, boundary.bias" in found.of("no-gradient")[0].seen
    assert "inputs (1 NaN)" in found.of("nonfinite-data")[0].seen
    assert "divide images by 255" in found.of("range")[0].remedy
    assert "kaiming_normal_" in found.of("extreme-gain")[0].remedy


def test_the_command_reports_the_same_findings(capsys):
    assert main(["diagnose", SPEC, "--json"]) == 1
    reported = json.loads(capsys.readouterr().out)["findings"]
    reported = [(f["kind"], f["where"]) for f in reported]
    assert [finding for finding in reported if finding in EXPECTED] == EXPECTED


FIXES = {
    "shape-mismatch": {"mask_size": SIZE},
    "lr-vanished": {"lr": 1e-3},
    "no-gradient": {"boundary": False},
    "nonfinite-data": {"fault": None},
    "range": {"scaled": True},
    "extreme-gain": {"init": False},
}


def findings(mask_size=32, lr=8.88e-21, eps=0.0, boundary=True, fault=Kind.DEAD_PIXEL, **fixes):
    """The diagnosis of the broken setup with some faults fixed, as `(kind, where)`."""
    torch.manual_seed(0)
    model = as_it_was() if fixes.get("init", True) else repaired()
    model.boundary = torch.nn.Conv2d(16, 1, 3) if boundary else torch.nn.Identity()
    model.attention = Attention(eps)
    model.decoder[1].size = mask_size
    batch = draw(4, 1, fault, scaled=fixes.get("scaled", False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return [(f.kind, f.where) for f in diagnose(model, batch, losses, optimizer)]


@pytest.mark.parametrize("kind", FIXES)
def test_fixing_one_fault_removes_only_its_finding(kind):
    left = findings(**FIXES[kind])
    assert kind not in [k for k, _ in left]
    assert ("nonfinite-activation", "attention (Attention)") in left


def test_an_eps_removes_the_finding_of_the_division():
    assert ("nonfinite-activation", "attention (Attention)") not in findings(eps=1e-6)


def test_the_repaired_setup_has_no_problems():
    torch.manual_seed(0)
    model = repaired()
    lr = adaptive_stream.SCHEDULE["floor"]  # used by all steps after the warm-up
    found = diagnose(model, draw(4, 1), losses, torch.optim.AdamW(model.parameters(), lr=lr))
    assert found.ok, found


# The guarded run, with the advice applied.


def test_the_guarded_run_learns(guarded):
    facts = guarded.facts
    assert guarded.survived and facts["weights"]
    assert facts["iou"] > 0.6  # chance, a full mask, is 0.13
    assert facts["accuracy"] > 0.85  # chance is 0.2
    assert len(guarded.losses) == BATCHES and all(map(math.isfinite, guarded.losses))
    assert sum(guarded.losses[-10:]) < sum(guarded.losses[:10])


def test_the_batch_with_the_dead_pixel_is_skipped_though_its_loss_is_finite(guarded):
    record = record_of(guarded, DEAD)
    assert record.action == "skipped"
    assert math.isnan(record.losses["batch.inputs"])
    assert math.isfinite(record.losses["mask"]) and math.isfinite(record.losses["label"])
    assert guarded.facts["batch_checks"][DEAD - 1] == "inputs holds NaN"


def test_inputs_out_of_range_are_recorded_and_cleaned(guarded):
    record = record_of(guarded, SWAPPED)
    assert record.spikes == ("batch.inputs",) and record.losses["batch.inputs"] == 1.0
    assert record.action in ("applied", "clipped")
    assert "inputs goes up to 3.40282e+38, above 1" in guarded.facts["batch_checks"][SWAPPED - 1]
    counts = guarded.facts["counts"][SWAPPED - 1]
    assert counts["encoder.0"].inf > 0 and counts["encoder.0"].over_limit > 0
    assert not any(counts["classifier"]) and not any(counts["decoder.0"])


def test_healthy_batches_have_no_counts(guarded):
    for batch, (counts, report) in enumerate(
        zip(guarded.facts["counts"], guarded.facts["batch_checks"], strict=True), start=1
    ):
        if batch not in (DEAD, SWAPPED):
            assert not any(map(any, counts.values())), batch
            assert report == "no problems in this batch", batch


def test_a_norm_above_a_hundred_is_skipped(guarded):
    record = record_of(guarded, SIXTEEN)
    assert (record.action, record.reason) == ("skipped", "grad_spike")
    assert record.total_norm > record.thresholds["grad_norm"] == 100.0
    others = [r.total_norm for r in guarded.records if r is not record]
    assert max(others) < 100.0
    assert [r.step for r in guarded.records if r.action == "skipped"] == [DEAD, SIXTEEN]


def test_the_learning_rate_never_falls_below_the_floor(guarded):
    lr, floor = guarded.facts["lr"], adaptive_stream.SCHEDULE["floor"]
    warm = adaptive_stream.SCHEDULE["warmup"]
    assert lr[0] == warm.lr and lr == sorted(lr, reverse=True)
    assert min(lr) == lr[warm.steps] == floor
    assert guarded.facts["held_at_floor"] > 0.9 * BATCHES


def test_the_floor_is_logged_once(caplog):
    training = Guarded()
    for batch in range(1, 13):
        training.one_batch(draw(2, batch), batch)
        training.schedule.step()
    (message,) = [r.getMessage() for r in caplog.records if "floor" in r.getMessage()]
    assert "GuardedLR: clamped lr" in message and "to floor [0.01]" in message


def test_the_demo_writes_picture_report_and_records(folder, guarded):
    assert_shown(folder)
    assert_recorded(folder, guarded)


# Each mechanism is needed: without it, the guarded run fails.


def test_without_the_floor_the_learning_rate_vanishes_again(monkeypatch, tmp_path):
    monkeypatch.setitem(adaptive_stream.SCHEDULE, "floor", 0.0)
    outcome = adaptive_stream.run(tmp_path, guarded=True)
    assert not outcome.survived
    assert outcome.facts["lr"][-1] < 1e-12 and outcome.facts["held_at_floor"] == 0


def test_without_skipping_the_weights_are_lost(monkeypatch, tmp_path):
    monkeypatch.setitem(adaptive_stream.GUARD, "nonfinite", "propagate")
    monkeypatch.setattr(adaptive_stream, "BATCHES", DEAD)
    assert not adaptive_stream.run(tmp_path, guarded=True).facts["weights"]


def test_without_threshold_and_clipping_one_batch_destroys_the_model(monkeypatch, tmp_path):
    monkeypatch.setitem(adaptive_stream.GUARD, "spike", None)
    monkeypatch.setitem(adaptive_stream.GUARD, "max_norm", None)
    outcome = adaptive_stream.run(tmp_path, guarded=True)
    assert record_of(outcome, SIXTEEN).action == "applied"
    assert not outcome.survived


def test_without_cleaning_the_batch_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setitem(adaptive_stream.ACTIVATIONS, "mode", "count")
    monkeypatch.setattr(adaptive_stream, "BATCHES", SWAPPED)
    outcome = adaptive_stream.run(tmp_path, guarded=True)
    assert not math.isfinite(outcome.losses[-1])
    assert record_of(outcome, SWAPPED).action == "skipped"


def test_without_the_check_the_records_do_not_show_bad_data(monkeypatch, tmp_path):
    unchecked = read_batch((), names=())
    monkeypatch.setattr(adaptive_stream, "check_batch", lambda *_, **__: unchecked)
    monkeypatch.setattr(adaptive_stream, "BATCHES", SWAPPED)
    outcome = adaptive_stream.run(tmp_path, guarded=True)
    assert list(record_of(outcome, DEAD).losses) == ["mask", "label"]
    assert record_of(outcome, SWAPPED).reason is None


def test_without_eps_in_the_division_cleaning_does_not_help(monkeypatch, tmp_path):
    """The gradient of 0/0 is NaN inside the module, even if its output is cleaned."""

    def without_eps():
        model = repaired()
        model.attention.eps = 0.0
        return model

    monkeypatch.setattr(Guarded, "new_model", staticmethod(without_eps))
    monkeypatch.setattr(adaptive_stream, "BATCHES", 10)
    outcome = adaptive_stream.run(tmp_path, guarded=True)
    assert all(map(math.isfinite, outcome.losses))
    assert outcome.facts["steps"] == 0
