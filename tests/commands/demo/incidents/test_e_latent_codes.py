"""E. The averages that became NaN: the original run, then the guarded run."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastguard
from fastguard import GuardConfig, LossMeter, read_records
from fastguard.commands.cli import main
from fastguard.commands.demo.incidents import latent_codes
from fastguard.commands.demo.incidents.latent_codes import (
    BATCHES,
    BROKEN_VALIDATION_BATCH,
    EPOCHS,
    FAULTS,
    LEARNED,
    LOST_EPOCH,
    SETTINGS,
    VALIDATION_BATCHES,
    AsItWas,
    Guarded,
)
from fastguard.commands.demo.incidents.latent_codes_data import Kind, sample
from fastguard.commands.demo.incidents.latent_codes_model import AutoDecoder
from fastguard.records import loss_meter
from guardtest import require
from guardtest.incidents import assert_shown

LETTER = "E"
for package in ("rich", "matplotlib", "plotly", "tensorboard", "yaml"):
    require(package)
TAG_OF = {fault: tag for tag, fault in FAULTS.items() if tag[0] != LOST_EPOCH}
OPEN_MESH, MILLIMETERS = TAG_OF[Kind.OPEN_MESH], TAG_OF[Kind.MILLIMETERS]
LIMITS = 1.0, 0.1  # max_norm of decoder and codes in SETTINGS


def index(tag):
    """The index of a batch among all steps."""
    epoch, batch = tag
    return BATCHES * (epoch - 1) + batch - 1


def curves(folder):
    """Maps each TensorBoard tag to its values by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


# The original run.


def test_one_bad_batch_makes_every_mean_of_training_nan(as_it_was):
    first_bad_epoch = OPEN_MESH[0]
    means = as_it_was.facts["training"]
    assert all(map(math.isfinite, means[: first_bad_epoch - 1]))
    assert all(map(math.isnan, means[first_bad_epoch - 1 :]))
    assert not as_it_was.survived
    assert not as_it_was.facts["weights"] and not as_it_was.facts["momenta"]


def test_one_bad_shape_makes_every_mean_of_validation_nan(as_it_was):
    """This also holds in the first epoch, when the model was still good."""
    assert all(map(math.isnan, as_it_was.facts["validation"]))
    assert math.isfinite(as_it_was.facts["training"][0])


# The guarded run.


def test_the_run_learns_to_the_end(guarded):
    assert guarded.survived
    assert guarded.facts["weights"] and guarded.facts["momenta"]
    assert guarded.facts["error"] < LEARNED
    skipped = [r.tag for r in guarded.records if r.action == "skipped"]
    assert skipped == [OPEN_MESH, *((LOST_EPOCH, batch) for batch in range(1, BATCHES + 1))]


def test_both_runs_agree_until_the_first_bad_batch(as_it_was, guarded):
    first = index(OPEN_MESH)
    assert guarded.losses[:first] == as_it_was.losses[:first]


def test_decoder_and_codes_have_their_own_limits(guarded):
    coefs, arrived = guarded.facts["clip_coefs"], guarded.facts["arrived"]
    assert {len(c) for c in coefs} == {2}
    exploded = index(MILLIMETERS)
    assert guarded.records[exploded].action == "clipped"
    assert coefs[exploded][0] != coefs[exploded][1]
    assert arrived[exploded] == pytest.approx(LIMITS)
    for record, norms in zip(guarded.records, arrived, strict=True):
        if record.action != "skipped":
            assert all(n <= limit * (1 + 1e-6) for n, limit in zip(norms, LIMITS, strict=True))


def test_one_guard_measures_both_in_one_pass(monkeypatch, tmp_path):
    passes, measure = [], fastguard.guard.guarded.measure

    def counted(*args):
        passes.append(measure(*args))
        return passes[-1]

    monkeypatch.setattr(fastguard.guard.guarded, "measure", counted)
    monkeypatch.setattr(latent_codes, "EPOCHS", 1)
    latent_codes.run(tmp_path, guarded=True)
    assert len(passes) == BATCHES
    assert {tuple(stats.power_sum.shape) for stats in passes} == {(2,)}


def test_means_cover_the_finite_batches(guarded):
    for epoch, summary in enumerate(guarded.facts["training"], start=1):
        losses = guarded.losses[BATCHES * (epoch - 1) : BATCHES * epoch]
        finite = [loss for loss in losses if math.isfinite(loss)]
        if epoch != LOST_EPOCH:
            assert summary.means["sdf"] == pytest.approx(statistics.fmean(finite))
        assert summary.finite["sdf"] == len(finite)
        assert summary.nonfinite["sdf"] == len(losses) - len(finite)


def test_the_bad_batches_are_counted_and_named(guarded):
    summary = guarded.facts["training"][OPEN_MESH[0] - 1]
    ((bad),) = summary.bad
    assert (bad.tag, bad.names) == (OPEN_MESH, ("sdf",))
    assert "(mean of 19 batches, 1 not finite)" in str(summary)
    for epoch, summary in enumerate(guarded.facts["validation"], start=1):
        assert summary.finite["sdf"] == VALIDATION_BATCHES - 1
        assert [bad.tag for bad in summary.bad] == [(epoch, BROKEN_VALIDATION_BATCH)]
        assert summary.means["sdf"] < 0.1


def test_an_epoch_without_a_valid_batch_is_reported(guarded):
    summary = guarded.facts["training"][LOST_EPOCH - 1]
    assert summary.means["sdf"] is None
    assert f"sdf: no valid batch ({BATCHES} seen, all not finite)" in str(summary)
    assert f"epoch {LOST_EPOCH} had no valid batch" in guarded.ended
    # The validation means do not change, because no step of this epoch was applied.
    before, after = (guarded.facts["validation"][i].means for i in (LOST_EPOCH - 2, LOST_EPOCH - 1))
    assert before == after


class NoSync(TorchDispatchMode):
    """Fails if a tensor value is copied to the host: `item()`, `float()`, `bool()`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "this waits for a GPU"
        return func(*args, **(kwargs or {}))


def test_the_meter_never_syncs_during_an_epoch(monkeypatch, guarded):
    """Makes the meter treat the CPU like a GPU."""
    monkeypatch.setattr(loss_meter, "_gpu_of", lambda values: torch.device("cpu"))
    meter, losses = LossMeter(), [*map(torch.tensor, guarded.losses[BATCHES : 2 * BATCHES])]
    with NoSync():
        for batch, loss in enumerate(losses, start=1):
            meter.update({"sdf": loss}, tag=(2, batch))
        with pytest.raises(AssertionError, match="waits"):
            losses[0].item()
    of_the_run = guarded.facts["training"][1]
    summary = meter.compute()
    assert summary.means["sdf"] == of_the_run.means["sdf"]
    assert summary.bad == of_the_run.bad


def test_values_out_of_range_are_named(guarded):
    record = guarded.records[index(MILLIMETERS)]
    assert (record.tag, record.spikes) == (MILLIMETERS, ("batch.sdf",))
    assert [r.tag for r in guarded.records if "batch.sdf" in r.spikes] == [MILLIMETERS]
    nonfinite = guarded.records[index(OPEN_MESH)]
    assert [n for n, v in nonfinite.losses.items() if not math.isfinite(v)] == ["sdf", "batch.sdf"]


# Settings from a file.


YAML = """\
guard:
  clip_scope: group
groups:
  "decoder.*": {max_norm: 1.0}
  "codes.*": {max_norm: 0.1}
batch:
  names: [shapes, points, sdf]
  low: {sdf: -2.0}
  high: {sdf: 2.0}
spike:
  batch.sdf: {max: 0.5, action: record}
"""


@pytest.mark.parametrize("suffix, text", [(".toml", SETTINGS), (".yaml", YAML)])
def test_the_file_sets_both_limits(suffix, text, tmp_path):
    file = tmp_path / f"guard{suffix}"
    file.write_text(text)
    model = AutoDecoder()
    config = GuardConfig.from_file(file)
    opt = config.wrap(model, torch.optim.Adam(model.parameters()))
    of_the_codes = [id(model.codes.weight)]
    assert {
        g["max_norm"]: [id(p) for p in g["params"]] == of_the_codes for g in opt.param_groups
    } == {1.0: False, 0.1: True}
    assert config == GuardConfig.from_dict(latent_codes_settings())


def latent_codes_settings():
    return {
        "guard": {"clip_scope": "group"},
        "groups": {"decoder.*": {"max_norm": 1.0}, "codes.*": {"max_norm": 0.1}},
        "batch": {"names": ["shapes", "points", "sdf"], "low": {"sdf": -2}, "high": {"sdf": 2}},
        "spike": {"batch.sdf": {"max": 0.5, "action": "record"}},
    }


def test_the_limits_of_the_file_are_applied(monkeypatch, tmp_path):
    monkeypatch.setattr(latent_codes, "SETTINGS", SETTINGS.replace("0.1", "0.001"))
    monkeypatch.setattr(latent_codes, "EPOCHS", 1)
    norms = latent_codes.run(tmp_path, guarded=True).facts["arrived"]
    assert max(codes for _, codes in norms) <= 0.001 * (1 + 1e-6)
    assert max(decoder for decoder, _ in norms) > 0.1


def test_a_typo_in_the_file_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(latent_codes, "SETTINGS", SETTINGS.replace("codes.*", "code.*"))
    with pytest.raises(ValueError, match=r"groups\.code\.\* matches no parameter"):
        latent_codes.run(tmp_path, guarded=True)


# TensorBoard, records and the demo's files.


def test_norms_coefficients_and_skips_are_in_tensorboard(folder, guarded):
    shown = curves(folder / "guarded" / "tensorboard")
    records = guarded.records
    for tag, values in {
        "train/grad_norm": {r.step: r.torch_norm for r in records},
        "train/clip_coef": {r.step: r.clip_coef for r in records},
        "train/skipped": {r.step: float(r.action == "skipped") for r in records},
    }.items():
        assert shown[tag] == pytest.approx(values, rel=1e-6, nan_ok=True)
    assert sum(shown["train/skipped"].values()) == 1 + BATCHES
    assert min(shown["train/clip_coef"].values()) < 0.01
    assert all(map(math.isfinite, shown["train/sdf_loss"].values()))


def test_the_demo_writes_picture_report_and_records(folder, guarded):
    assert_shown(folder)
    records = list(read_records(folder / "records.jsonl", strict=True))
    assert [json.dumps(r.as_dict()) for r in records] == [  # as JSON, tuples and lists are equal
        json.dumps(r.as_dict()) for r in guarded.records
    ]


def test_the_incidents_are_shown_by_one_command(folder, capsys):
    assert main(["monitor", "--once", str(folder / "records.jsonl")]) == 1
    assert f"22 incidents in the last {EPOCHS * BATCHES} steps" in capsys.readouterr().out


# Each mechanism is needed: without it, the guarded run fails.


def test_without_skipping_the_weights_are_lost(monkeypatch, tmp_path):
    applying = SETTINGS.replace("[guard]", '[guard]\nnonfinite = "propagate"')
    monkeypatch.setattr(latent_codes, "SETTINGS", applying)
    outcome = latent_codes.run(tmp_path, guarded=True)
    assert not outcome.survived and not outcome.facts["weights"]


def test_with_a_single_limit_the_codes_exceed_their_own_limit(monkeypatch, tmp_path):
    joint = SETTINGS[SETTINGS.index("[batch]") :] + "\n[guard]\nmax_norm = 1.0\n"
    monkeypatch.setattr(latent_codes, "SETTINGS", joint)
    outcome = latent_codes.run(tmp_path, guarded=True)
    exploded = index(MILLIMETERS)
    assert {len(coefs) for coefs in outcome.facts["clip_coefs"]} == {1}
    decoder, codes = outcome.facts["arrived"][exploded]
    assert math.hypot(decoder, codes) == pytest.approx(1.0)
    assert codes > LIMITS[1] * 1.05


def test_without_limits_one_batch_in_another_unit_stops_learning(monkeypatch, tmp_path):
    """Adam averages squared gradients over a thousand steps."""
    limitless = SETTINGS.replace("max_norm = 1.0", "").replace("max_norm = 0.1", "")
    monkeypatch.setattr(latent_codes, "SETTINGS", limitless)
    outcome = latent_codes.run(tmp_path, guarded=True)
    assert outcome.facts["weights"]
    assert not outcome.survived and outcome.facts["error"] > LEARNED


@pytest.fixture
def handwritten_average(monkeypatch):
    """A common handwritten average over the valid losses, which never divides by zero."""

    def mean(self):
        valid = [loss for loss in self._of_the_epoch if math.isfinite(loss)]
        self._of_the_epoch.clear()
        return sum(valid) / max(len(valid), 1)

    monkeypatch.setattr(Guarded, "average", AsItWas.average)
    monkeypatch.setattr(Guarded, "mean", mean)


def test_without_the_meter_means_are_nan_despite_finite_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(Guarded, "average", AsItWas.average)
    monkeypatch.setattr(Guarded, "mean", AsItWas.mean)
    facts = latent_codes.run(tmp_path, guarded=True).facts
    assert facts["weights"]
    assert all(map(math.isnan, facts["validation"]))
    assert math.isnan(facts["training"][OPEN_MESH[0] - 1])


def test_with_a_handwritten_average_the_lost_epoch_looks_best(handwritten_average, tmp_path):
    means = latent_codes.run(tmp_path, guarded=True).facts["training"]
    assert min(means) == means[LOST_EPOCH - 1] == 0.0


def test_without_the_batch_check_the_other_unit_is_not_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(latent_codes, "SETTINGS", SETTINGS[: SETTINGS.index("[batch]")])
    monkeypatch.setattr(latent_codes, "EPOCHS", MILLIMETERS[0])
    record = latent_codes.run(tmp_path, guarded=True).records[index(MILLIMETERS)]
    assert record.reason is None and not record.spikes


def test_without_its_sink_tensorboard_shows_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(latent_codes, "TensorBoardSink", lambda writer: lambda record: None)
    monkeypatch.setattr(latent_codes, "EPOCHS", 1)
    latent_codes.run(tmp_path, guarded=True)
    assert curves(tmp_path / "tensorboard") == {}


def test_faulty_batches_contain_their_faults():
    random = torch.Generator().manual_seed(0)
    by_kind = {kind: sample(4, random, kind)[2] for kind in (None, *Kind)}
    assert by_kind[None].abs().max() < 2
    assert by_kind[Kind.OPEN_MESH].isnan().sum() == by_kind[None].shape[1]
    assert by_kind[Kind.MILLIMETERS].abs().max() > 100
    assert not by_kind[Kind.LOST_SCALE].isfinite().any()
