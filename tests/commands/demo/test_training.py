"""The three runs of the demo, with faults and without."""

import dataclasses
import json
import math

import pytest
import torch

from fastguard.commands.demo.faults import EARLY, LATE, MIN_STEPS, Kind, plan
from fastguard.commands.demo.model import GPT
from fastguard.commands.demo.text import load_text
from fastguard.commands.demo.training import (
    WAYS,
    Bare,
    Clipped,
    Guarded,
    Settings,
    one_thread,
    train,
)
from fastguard.commands.usage import UsageError

TINY = Settings(
    steps=40, width=16, layers=1, heads=2, context=16, batch_size=4, validation_windows=8
)
FAULTS = plan(TINY.steps)


@pytest.fixture(scope="module")
def text():
    return load_text()


@pytest.fixture(scope="module")
def runs(text):
    with one_thread():
        return {way: train(way, TINY, text, FAULTS) for way in WAYS}


def at(step_of, kind, in_burst=False):
    """The record of the fault of this kind."""
    (fault,) = (f for f in FAULTS if f.kind is kind and f.in_burst is in_burst)
    return step_of[fault.step]


# With faults.


@pytest.mark.parametrize("way", [Bare, Clipped])
def test_faults_destroy_unguarded_runs(runs, way):
    (inf,) = (f.step for f in FAULTS if f.kind is Kind.INF_GRAD and not f.in_burst)
    run = runs[way]
    assert run.destroyed_at == inf
    assert math.isnan(run.validation)
    assert all(map(math.isfinite, run.losses[:inf]))
    assert not any(map(math.isfinite, run.losses[inf:]))
    assert (run.applied, run.skipped) == (TINY.steps, 0)


def test_the_guarded_run_skips_exactly_the_faults(runs):
    run = runs[Guarded]
    assert run.destroyed_at is None
    assert run.validation < run.losses[0] < math.inf
    skipped = [r.step for r in run.records if r.action == "skipped"]
    assert skipped == [fault.step for fault in FAULTS]
    assert (run.applied, run.skipped) == (TINY.steps - len(FAULTS), len(FAULTS))
    assert [r.tag for r in run.records] == [{"batch": i} for i in range(1, TINY.steps + 1)]


@pytest.mark.parametrize("in_burst", [False, True], ids=["alone", "in a burst"])
def test_each_kind_of_fault_is_recorded(runs, in_burst):
    record_of = {record.step: record for record in runs[Guarded].records}
    spike, inf, loss, nan = (
        at(record_of, kind, in_burst)
        for kind in (Kind.SPIKE, Kind.INF_GRAD, Kind.NAN_LOSS, Kind.NAN_GRAD)
    )
    assert (spike.reason, spike.spikes, spike.culprits) == ("grad_spike", ("grad_norm",), ())
    assert spike.total_norm > 100 * spike.thresholds["grad_norm"]
    assert (inf.reason, inf.culprits) == ("nonfinite_grad", ((EARLY, 0, 1, 0),))
    assert (nan.reason, nan.culprits) == ("nonfinite_grad", ((LATE, 1, 0, 0),))
    n_parameters = len(list(GPT(16, 1, 2, 16).parameters()))
    assert (loss.reason, loss.n_culprits) == ("nonfinite_grad", n_parameters)
    assert math.isnan(loss.losses["loss"])


def test_the_consecutive_skips_of_the_burst_are_counted(runs):
    burst = [f.step for f in FAULTS if f.in_burst]
    in_a_row = [r.consecutive_skips for r in runs[Guarded].records if r.step in burst]
    assert in_a_row == [1, 2, 3, 4]


# Without faults.


def test_without_faults_and_clipping_the_guarded_run_equals_the_clipped_run(text):
    """max_norm is so large that nothing is clipped."""
    loose = dataclasses.replace(TINY, max_norm=1e3)
    clipped, guarded = (train(way, loose, text) for way in (Clipped, Guarded))
    assert all(record.clip_coef == 1.0 for record in guarded.records)
    assert guarded.losses == clipped.losses
    assert guarded.validation == clipped.validation


def test_without_faults_the_guarded_run_stays_close_when_both_clip(text):
    clipped, guarded = (train(way, TINY, text) for way in (Clipped, Guarded))
    assert any(record.clip_coef < 1.0 for record in guarded.records)
    assert guarded.skipped == 0
    assert guarded.validation == pytest.approx(clipped.validation, abs=1e-3)


def test_runs_are_reproducible_by_seed(text):
    first, again = (train(Guarded, TINY, text, FAULTS) for _ in range(2))
    assert json.dumps(first.losses) == json.dumps(again.losses)  # as text, NaN equals NaN
    fields = [[r.as_dict() | {"time": 0.0} for r in run.records] for run in (first, again)]
    assert fields[0] == fields[1]
    other = train(Guarded, dataclasses.replace(TINY, seed=1), text, FAULTS)
    assert first.losses[0] != other.losses[0]


# The parts of the demo.


@pytest.mark.parametrize("steps", [MIN_STEPS, 21, 50, 400, 1001])
def test_faults_do_not_overlap_for_any_number_of_steps(steps):
    faults = plan(steps)
    when = [fault.step for fault in faults]
    assert len(set(when)) == len(when)
    assert dataclasses.replace(TINY, steps=steps).spike_rule.warmup < when[0]
    assert max(when) <= steps
    assert {fault.kind for fault in faults} == set(Kind)


def test_on_step_is_called_after_each_step(text):
    seen = []
    train(Bare, TINY, text, on_step=lambda run: seen.append(len(run.losses)))
    assert seen == list(range(1, TINY.steps + 1))


def test_one_thread_restores_the_number_of_threads():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_held_out_files_are_not_in_the_training_text(tmp_path):
    for i in range(20):
        (tmp_path / f"m{i:02}.py").write_bytes(bytes([65 + i]) * 10_000)
    (tmp_path / "_generated.py").write_bytes(b"!" * 10_000)
    text = load_text(tmp_path, cap=150_000)
    assert sorted(set(text.validation.tolist())) == [74]  # the tenth file
    assert len(text.training) + len(text.validation) == 150_000
    assert ord("!") not in text.training
    inputs, targets = text.held_out(3, 8)
    assert inputs.shape == targets.shape == (3, 8)


def test_batches_are_windows_of_the_text_shifted_by_one(text):
    inputs, targets = next(text.batches(4, 16, seed=0))
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    again, _ = next(text.batches(4, 16, seed=0))
    assert torch.equal(inputs, again)


def test_a_python_without_source_files_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="holds 0 bytes of Python source"):
        load_text(tmp_path)
