"""C. The segmentation model with too many heads: first the damage, then the same run guarded."""

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
PADDED, OTHER_UNIT = BATCH_OF[Kind.LETTERBOX], BATCH_OF[Kind.MICROMETRES]


def record_of(outcome, batch):
    """The record of a batch."""
    (record,) = (r for r in outcome.records if r.tag == {"batch": batch})
    return record


def batch_with(fault=None, seed=3):
    return draw(4, torch.Generator().manual_seed(seed), fault)


# As it was.


def test_one_padded_image_costs_the_run(as_it_was):
    facts = as_it_was.facts
    assert not as_it_was.survived
    assert not facts["weights"] and not facts["momenta"]
    assert facts["iou"] == 0.0
    assert all(map(math.isfinite, as_it_was.losses[:PADDED]))
    assert not any(map(math.isfinite, as_it_was.losses[PADDED:]))


# Under guard.


def test_the_run_learns_to_the_end(guarded):
    facts = guarded.facts
    assert guarded.survived
    assert facts["weights"] and facts["momenta"]
    assert facts["iou"] > 0.6
    assert all(map(math.isfinite, guarded.losses))
    assert [r.step for r in guarded.records if r.action == "skipped"] == [PADDED]


def test_the_part_that_went_non_finite_is_named(guarded):
    record = record_of(guarded, PADDED)
    assert record.reason == "nonfinite_grad"
    assert [name for name, v in record.losses.items() if not math.isfinite(v)] == ["boundary"]
    # The heads whose own part of the loss was finite are not among the culprits.
    assert record.n_culprits == 15 and record.culprits[0][0] == "down.0.weight"
    assert "boundary=nan" in str(record)


def test_the_part_that_spiked_is_named_in_a_record_that_changes_nothing(guarded):
    record = record_of(guarded, OTHER_UNIT)
    assert record.spikes == ("grad_norm", "distance")
    assert (record.action, record.reason) == ("clipped", "grad_spike")
    assert record.total_norm > record.thresholds["grad_norm"] == 100.0
    assert record.losses["distance"] > 1000 * record.thresholds["distance"]
    assert max(v for name, v in record.losses.items() if name != "distance") < 100.0


def test_warnings_are_as_rare_as_what_they_warn_of(guarded):
    assert [r.step for r in guarded.records if "grad_norm" in r.spikes] == [OTHER_UNIT]
    assert len([r for r in guarded.records if r.spikes]) < 0.1 * BATCHES


def test_the_explosion_of_one_module_does_not_starve_the_others(guarded):
    coefs = guarded.facts["clip_coefs"]

    def typical(name):
        return statistics.median(step[name] for step in coefs)

    assert typical("contour") < 0.02
    assert typical("seg") == typical("distance") == 1.0
    assert typical("body") > 0.2


def test_a_group_cannot_do_more_than_its_limit(guarded):
    assert len(guarded.facts["largest_gradient"]) == BATCHES - 1
    for arrived in guarded.facts["largest_gradient"]:
        assert max(arrived["body"], arrived["seg"], arrived["boundary"]) <= 1.0
        assert arrived["contour"] <= LIMITS["contour"]["max_norm"]


def test_the_values_of_the_chosen_module_are_clamped(guarded):
    largest = [arrived["distance"] for arrived in guarded.facts["largest_gradient"]]
    limit = LIMITS["distance"]["clip_value"]
    assert max(largest) == pytest.approx(limit)
    assert min(largest) < limit / 2  # and left alone where they are small


def test_the_first_nan_is_traced_to_the_division_in_the_refinement_module(guarded):
    report = guarded.facts["explained"]
    assert (report.origin, report.kind) == ("forward", "division")
    assert report.module == "boundary (BoundaryRefinement)"
    assert report.operation == "aten.div.Tensor"
    assert "denominators are exactly 0" in report.evidence
    assert "eps" in report.remedy
    assert report.precision is False  # of bfloat16: float32 does not help


def test_what_the_demo_leaves(folder, guarded):
    assert_shown(folder)
    assert_recorded(folder, guarded)


def test_what_had_to_be_written_by_hand_is_one_command(folder, capsys):
    assert main(["monitor", "--once", str(folder / "records.jsonl")]) == 1
    printed = capsys.readouterr().out
    assert "boundary=nan" in printed and "'batch': 81" in printed


# Where the first non-finite value is born: forward, backward, nowhere.


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


def test_a_floor_under_the_norm_is_the_cure():
    batch = batch_with(Kind.LETTERBOX)
    assert explain_nonfinite(UNet(divided), batch, losses, autocast=autocast()).found
    assert not explain_nonfinite(UNet(floored), batch, losses, autocast=autocast()).found


def test_the_cause_is_lost_once_the_weights_are_nan():
    model = UNet(divided)
    torch.nn.init.constant_(model.seg.bias, math.nan)
    assert explain_nonfinite(model, batch_with(Kind.LETTERBOX), losses).origin == "parameter"


# Is it the range of float16?


def blamed(direction, fault, dtype):
    """The findings that say that the range of a 16-bit format is to blame."""
    narrow = None if dtype is None else torch.autocast("cpu", dtype)
    found = diagnose(UNet(direction), batch_with(fault), losses, autocast=narrow)
    return found, found.of("float16-range")


def test_float16_is_blamed_for_what_float32_can_hold():
    found, (finding,) = blamed(floored, Kind.TWELVE_BITS, torch.float16)
    assert "the range of float16 is to blame, not the model" in finding.seen
    assert finding.where == "attention (Attention)"
    assert finding.value > 65504
    assert "bfloat16" in finding.remedy
    assert not found.ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "float32"])
def test_the_same_batch_is_finite_in_a_wider_range(dtype):
    found, findings = blamed(floored, Kind.TWELVE_BITS, dtype)
    assert not findings
    assert not found.of("nonfinite-activation") and not found.of("nonfinite-loss")


def test_float16_is_not_blamed_for_a_division_by_zero():
    found, findings = blamed(divided, Kind.LETTERBOX, torch.float16)
    assert not findings
    assert found.of("nonfinite-activation")[0].where == "boundary (BoundaryRefinement)"


# Each mechanism is needed: without it, the run does not end as it should.


def test_without_skipping_the_weights_are_lost(monkeypatch, tmp_path):
    monkeypatch.setitem(segmentation.GUARD, "nonfinite", "propagate")
    outcome = segmentation.run(tmp_path, guarded=True)
    assert not outcome.survived and not outcome.facts["weights"]


def test_with_one_limit_for_all_the_mask_is_starved(monkeypatch, tmp_path):
    monkeypatch.setitem(segmentation.GUARD, "clip_scope", "global")
    own = {"distance": {"clip_value": LIMITS["distance"]["clip_value"]}}
    monkeypatch.setattr(segmentation, "LIMITS", own)
    outcome = segmentation.run(tmp_path, guarded=True)
    assert outcome.facts["weights"]
    assert not outcome.survived and outcome.facts["iou"] < 0.2
    assert statistics.median(step["seg"] for step in outcome.facts["clip_coefs"]) < 0.1


def test_without_the_value_clamp_one_batch_throws_the_distance_head_away(
    guarded, monkeypatch, tmp_path
):
    monkeypatch.setitem(segmentation.LIMITS, "distance", {"max_norm": math.inf})
    outcome = segmentation.run(tmp_path, guarded=True)
    assert not outcome.survived
    assert outcome.facts["distance_error"] > 10 * guarded.facts["distance_error"]
    assert max(a["distance"] for a in outcome.facts["largest_gradient"]) > 100.0


@pytest.mark.parametrize("rule", ["grad_norm", "distance"])
def test_without_its_rule_nothing_warns(rule, guarded, monkeypatch, tmp_path):
    rules = {name: r for name, r in segmentation.GUARD["spike"].items() if name != rule}
    monkeypatch.setitem(segmentation.GUARD, "spike", rules)
    monkeypatch.setattr(segmentation, "BATCHES", 41)
    monkeypatch.setattr(segmentation, "FAULTS", {40: Kind.MICROMETRES})
    record = record_of(segmentation.run(tmp_path, guarded=True), 40)
    assert record.spikes == tuple(rules)


def test_without_its_parts_the_loss_says_that_it_is_bad_and_no_more(monkeypatch, tmp_path):
    step = GuardedOptimizer.step

    def step_with_the_sum(self, *, loss, tag):
        return step(self, loss=torch.stack([*loss.values()]).sum(), tag=tag)

    monkeypatch.setattr(GuardedOptimizer, "step", step_with_the_sum)
    monkeypatch.setattr(segmentation, "BATCHES", 3)
    monkeypatch.setattr(segmentation, "FAULTS", {2: Kind.LETTERBOX})
    record = record_of(segmentation.run(tmp_path, guarded=True), 2)
    assert list(record.losses) == ["loss"]
    assert record.action == "skipped"
