"""C. The segmentation model with too many heads: the original run, then the guarded run."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from fastguard import GuardedOptimizer, diagnose, explain_nonfinite
from fastguard.commands.cli import main
from fastguard.commands.demo.incidents import segmentation
from fastguard.commands.demo.incidents.segmentation import (
    BATCHES,
    FAULTS,
    LIMITS,
    autocast,
    param_groups,
)
from fastguard.commands.demo.incidents.segmentation_data import Kind, draw
from fastguard.commands.demo.incidents.segmentation_model import (
    UNet,
    divided,
    floored,
    losses,
    masked,
)
from guardtest import require
from guardtest.incidents import assert_recorded, assert_shown

LETTER = "C"
for package in ("rich", "matplotlib", "plotly"):
    require(package)
BATCH_OF = {fault: number for number, fault in FAULTS.items()}
PADDED, OTHER_UNIT = BATCH_OF[Kind.LETTERBOX], BATCH_OF[Kind.MICROMETERS]


def record_of(outcome, batch):
    """The record of a batch."""
    (record,) = (r for r in outcome.records if r.tag == {"batch": batch})
    return record


def batch_with(fault=None, seed=3):
    return draw(4, torch.Generator().manual_seed(seed), fault)


# The original run.


def test_one_padded_image_destroys_the_original_run(as_it_was):
    facts = as_it_was.facts
    assert not as_it_was.survived
    assert not facts["weights"] and not facts["momenta"]
    assert facts["iou"] == 0.0
    assert all(map(math.isfinite, as_it_was.losses[:PADDED]))
    assert not any(map(math.isfinite, as_it_was.losses[PADDED:]))


# The guarded run.


def test_the_run_learns_to_the_end(guarded):
    facts = guarded.facts
    assert guarded.survived
    assert facts["weights"] and facts["momenta"]
    assert facts["iou"] > 0.6
    assert all(map(math.isfinite, guarded.losses))
    assert [r.step for r in guarded.records if r.action == "skipped"] == [PADDED]


def test_the_non_finite_part_of_the_loss_is_named(guarded):
    record = record_of(guarded, PADDED)
    assert record.reason == "nonfinite_grad"
    assert [name for name, v in record.losses.items() if not math.isfinite(v)] == ["boundary"]
    # Heads whose part of the loss was finite are not among the culprits.
    assert record.n_culprits == 15 and record.culprits[0][0] == "down.0.weight"
    assert "boundary=nan" in str(record)


def test_a_spike_of_one_part_is_recorded(guarded):
    record = record_of(guarded, OTHER_UNIT)
    assert record.spikes == ("grad_norm", "distance")
    assert (record.action, record.reason) == ("clipped", "grad_spike")
    assert record.total_norm > record.thresholds["grad_norm"] == 100.0
    assert record.losses["distance"] > 1000 * record.thresholds["distance"]
    assert max(v for name, v in record.losses.items() if name != "distance") < 100.0


def test_spikes_are_rare(guarded):
    assert [r.step for r in guarded.records if "grad_norm" in r.spikes] == [OTHER_UNIT]
    assert len([r for r in guarded.records if r.spikes]) < 0.1 * BATCHES


def test_a_large_gradient_of_one_head_does_not_scale_the_others(guarded):
    coefs = guarded.facts["clip_coefs"]

    def typical(name):
        return statistics.median(step[name] for step in coefs)

    assert typical("contour") < 0.02
    assert typical("seg") == typical("distance") == 1.0
    assert typical("body") > 0.2


def test_gradients_of_each_group_respect_its_limit(guarded):
    assert len(guarded.facts["largest_gradient"]) == BATCHES - 1
    for arrived in guarded.facts["largest_gradient"]:
        assert max(arrived["body"], arrived["seg"], arrived["boundary"]) <= 1.0
        assert arrived["contour"] <= LIMITS["contour"]["max_norm"]


def test_the_gradient_elements_of_the_distance_head_are_clamped(guarded):
    largest = [arrived["distance"] for arrived in guarded.facts["largest_gradient"]]
    limit = LIMITS["distance"]["clip_value"]
    assert max(largest) == pytest.approx(limit)
    assert min(largest) < limit / 2  # small elements are not changed


def test_the_first_nan_is_traced_to_the_division(guarded):
    report = guarded.facts["explained"]
    assert (report.origin, report.kind) == ("forward", "division")
    assert report.module == "boundary (BoundaryRefinement)"
    assert report.operation == "aten.div.Tensor"
    assert "denominators are exactly 0" in report.evidence
    assert "eps" in report.remedy
    assert report.precision is False  # float32 would not help


def test_the_demo_writes_picture_report_and_records(folder, guarded):
    assert_shown(folder)
    assert_recorded(folder, guarded)


def test_the_incident_is_shown_by_one_command(folder, capsys):
    assert main(["monitor", "--once", str(folder / "records.jsonl")]) == 1
    printed = capsys.readouterr().out
    assert "boundary=nan" in printed and "'batch': 81" in printed


# Where the first non-finite value appears: forward, backward, nowhere.


def test_a_mask_after_the_division_moves_the_nan_to_the_backward_pass():
    model, (images, targets) = UNet(masked), batch_with(Kind.LETTERBOX)
    opt = GuardedOptimizer(
        torch.optim.SGD(param_groups(model), lr=0.1), named_parameters=model.named_parameters()
    )
    parts = losses(model(images), targets)
    torch.stack([*parts.values()]).sum().backward()
    opt.step(loss=parts)
    (record,) = opt.records()
    assert all(map(math.isfinite, record.losses.values()))
    assert (record.action, record.reason) == ("skipped", "nonfinite_grad")
    assert [name for name, *_ in record.culprits] == ["boundary.slope.weight"]

    report = explain_nonfinite(model, (images, targets), losses)
    assert (report.origin, report.operation) == ("backward", "DivBackward0")
    assert report.module == "boundary (BoundaryRefinement)"
    assert report.bad_gradients == ("boundary.slope.weight",)
    assert "denominators are exactly 0" in report.evidence


def test_an_eps_in_the_norm_fixes_the_division():
    batch = batch_with(Kind.LETTERBOX)
    assert explain_nonfinite(UNet(divided), batch, losses, autocast=autocast()).found
    assert not explain_nonfinite(UNet(floored), batch, losses, autocast=autocast()).found


def test_the_cause_cannot_be_found_once_the_weights_are_nan():
    model = UNet(divided)
    torch.nn.init.constant_(model.seg.bias, math.nan)
    assert explain_nonfinite(model, batch_with(Kind.LETTERBOX), losses).origin == "parameter"


# Is the range of float16 the cause?


def diagnosed(direction, fault, dtype):
    """The diagnosis, and its findings that name the range of a 16-bit format as the cause."""
    narrow = None if dtype is None else torch.autocast("cpu", dtype)
    found = diagnose(UNet(direction), batch_with(fault), losses, autocast=narrow)
    return found, found.of("float16-range")


def test_an_overflow_in_float16_is_attributed_to_the_dtype():
    found, (finding,) = diagnosed(floored, Kind.TWELVE_BITS, torch.float16)
    assert "the cause is the range of float16, not the model" in finding.seen
    assert finding.where == "attention (Attention)"
    assert finding.value > 65504
    assert "bfloat16" in finding.remedy
    assert not found.ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "float32"])
def test_the_same_batch_is_finite_in_bfloat16_and_float32(dtype):
    found, findings = diagnosed(floored, Kind.TWELVE_BITS, dtype)
    assert not findings
    assert not found.of("nonfinite-activation") and not found.of("nonfinite-loss")


def test_a_division_by_zero_is_not_attributed_to_float16():
    found, findings = diagnosed(divided, Kind.LETTERBOX, torch.float16)
    assert not findings
    assert found.of("nonfinite-activation")[0].where == "boundary (BoundaryRefinement)"


# Each mechanism is needed: without it, the guarded run fails.


def test_without_skipping_the_weights_are_lost(monkeypatch, tmp_path):
    monkeypatch.setitem(segmentation.GUARD, "nonfinite", "propagate")
    outcome = segmentation.run(tmp_path, guarded=True)
    assert not outcome.survived and not outcome.facts["weights"]


def test_with_a_single_limit_the_mask_does_not_learn(monkeypatch, tmp_path):
    monkeypatch.setitem(segmentation.GUARD, "clip_scope", "global")
    own = {"distance": {"clip_value": LIMITS["distance"]["clip_value"]}}
    monkeypatch.setattr(segmentation, "LIMITS", own)
    outcome = segmentation.run(tmp_path, guarded=True)
    assert outcome.facts["weights"]
    assert not outcome.survived and outcome.facts["iou"] < 0.2
    assert statistics.median(step["seg"] for step in outcome.facts["clip_coefs"]) < 0.1


def test_without_clip_value_one_batch_destroys_the_distance_head(guarded, monkeypatch, tmp_path):
    monkeypatch.setitem(segmentation.LIMITS, "distance", {"max_norm": math.inf})
    outcome = segmentation.run(tmp_path, guarded=True)
    assert not outcome.survived
    assert outcome.facts["distance_error"] > 10 * guarded.facts["distance_error"]
    assert max(a["distance"] for a in outcome.facts["largest_gradient"]) > 100.0


@pytest.mark.parametrize("rule", ["grad_norm", "distance"])
def test_without_its_rule_a_spike_is_not_recorded(rule, guarded, monkeypatch, tmp_path):
    rules = {name: r for name, r in segmentation.GUARD["spike"].items() if name != rule}
    monkeypatch.setitem(segmentation.GUARD, "spike", rules)
    monkeypatch.setattr(segmentation, "BATCHES", 41)
    monkeypatch.setattr(segmentation, "FAULTS", {40: Kind.MICROMETERS})
    record = record_of(segmentation.run(tmp_path, guarded=True), 40)
    assert record.spikes == tuple(rules)


def test_without_named_parts_only_the_whole_loss_is_recorded(monkeypatch, tmp_path):
    step = GuardedOptimizer.step

    def step_with_the_sum(self, *, loss, tag):
        return step(self, loss=torch.stack([*loss.values()]).sum(), tag=tag)

    monkeypatch.setattr(GuardedOptimizer, "step", step_with_the_sum)
    monkeypatch.setattr(segmentation, "BATCHES", 3)
    monkeypatch.setattr(segmentation, "FAULTS", {2: Kind.LETTERBOX})
    record = record_of(segmentation.run(tmp_path, guarded=True), 2)
    assert list(record.losses) == ["loss"]
    assert record.action == "skipped"
