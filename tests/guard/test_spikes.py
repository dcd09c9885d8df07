"""Spikes that a guarded step skips, clips or records, and the skip budget."""

import math

import pytest
import torch

from fastguard import GuardedOptimizer, SpikeRule, Threshold, TrainingDivergedError
from guardtest.guarded import one, steps_with
from guardtest.training import assert_same_bits, give_gradients, new_parameters, poison, snapshot

NAN, INF = math.nan, math.inf


def test_a_gradient_spike_is_skipped_after_the_warmup():
    p, opt = one(1.0, spike=SpikeRule(window=8, warmup=4, sigma=6.0))
    records = steps_with(opt, p, [1.0, 1.1, 1000.0, 1.2, 0.9])
    assert [r.action for r in records] == ["applied"] * 5  # the rule is still in its warm-up
    p, opt = one(1.0, spike=SpikeRule(window=8, warmup=4, sigma=6.0))
    records = steps_with(opt, p, [1.0, 1.1, 1.2, 0.9, 1000.0, 1.0])
    assert [r.action for r in records] == ["applied"] * 4 + ["skipped", "applied"]
    spike = records[4]
    assert (spike.reason, spike.spikes) == ("grad_spike", ("grad_norm",))
    values = torch.tensor([1.0, 1.1, 1.2, 0.9], dtype=torch.float32).double()
    expected = values.mean() + 6.0 * values.std(correction=0)
    assert spike.thresholds["grad_norm"] == pytest.approx(expected.item(), rel=1e-6)
    assert records[0].thresholds["grad_norm"] == INF


def test_a_spike_may_be_clipped_to_its_threshold():
    rule = SpikeRule(window=8, warmup=4, sigma=6.0, action="clip")
    p, opt = one(1.0, spike=rule, max_norm=100.0)
    steps_with(opt, p, [1.0, 1.1, 1.2, 0.9])
    before = p.item()
    (record,) = steps_with(opt, p, [1000.0])
    assert (record.action, record.reason) == ("clipped", "grad_spike")
    assert before - p.item() == pytest.approx(record.thresholds["grad_norm"], rel=1e-5)


def test_a_spike_may_only_be_recorded():
    p, opt = one(1.0, spike=Threshold(max=2.0, action="record"))
    (record,) = steps_with(opt, p, [5.0])
    assert (record.action, record.reason, record.spikes) == (
        "applied",
        "grad_spike",
        ("grad_norm",),
    )
    assert p.item() == -5.0


def test_a_threshold_applies_from_the_first_step_and_passes_smaller_values():
    p, opt = one(1.0, spike={"grad_norm": Threshold(max=10.0), "ce": Threshold(max=3.0)})
    records = steps_with(opt, p, [11.0, 10.0])
    assert [r.action for r in records] == ["skipped", "applied"]
    opt.step(loss={"ce": 3.5})
    opt.step(loss={"ce": 3.0})
    opt.step(loss={"other": 99.0})
    records = opt.records()
    assert [r.action for r in records] == ["skipped", "applied", "applied"]
    assert (records[0].reason, records[0].spikes) == ("loss_spike", ("ce",))
    assert "ce=3.5 > 3" in str(records[0])


def test_losses_have_their_own_baselines():
    rules = {
        "a": SpikeRule(window=4, warmup=2, sigma=3.0),
        "b": SpikeRule(window=4, warmup=2, sigma=3.0),
    }
    _, opt = one(1.0, spike=rules)
    for _ in range(3):
        opt.step(loss={"a": 1.0, "b": 100.0})
    opt.step(loss={"a": 100.0, "b": 100.0})
    assert opt.records()[-1].spikes == ("a",)


def test_a_nan_loss_does_not_block_later_steps():
    """If a NaN entered the window, all comparisons would be false for 128 steps."""
    rules = {"grad_norm": SpikeRule(window=8, warmup=4), "loss": SpikeRule(window=8, warmup=4)}
    p, opt = one(1.0, spike=rules)
    steps_with(opt, p, [1.0] * 6, loss=2.0)
    steps_with(opt, p, [1.0], loss=NAN)
    steps_with(opt, p, [NAN], loss=2.0)
    windows = opt.state_dict()["fastguard"]["windows"]
    assert windows.isfinite().all()
    records = steps_with(opt, p, [1.0] * 10, loss=2.0)
    assert {r.action for r in records} == {"applied"}
    (spike,) = steps_with(opt, p, [1e4], loss=2.0)
    assert spike.action == "skipped"  # the rules still work


def test_a_nan_norm_is_not_treated_as_a_small_norm():
    """`nan > threshold` is False, so the counts decide instead of the comparison."""
    p, opt = one(1.0, spike=Threshold(max=10.0))
    (record,) = steps_with(opt, p, [NAN])
    assert (record.action, record.reason) == ("skipped", "nonfinite_grad")


def test_a_lasting_level_shift_becomes_the_new_baseline():
    p, opt = one(1.0, spike=SpikeRule(window=4, warmup=2, sigma=3.0))
    steps_with(opt, p, [1.0] * 4)
    records = steps_with(opt, p, [50.0] * 40)
    skipped = [r.action for r in records].index("applied")
    assert skipped <= 8
    assert {r.action for r in records[-20:]} == {"applied"}


# Budget.


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
def test_the_skip_budget_raises_and_the_nan_is_never_applied(fused):
    parameters = new_parameters()
    opt = GuardedOptimizer(
        torch.optim.AdamW(parameters, fused=fused),
        max_consecutive_skips=2,
        named_parameters=[(f"w{i}", p) for i, p in enumerate(parameters)],
    )
    before = snapshot(opt)
    for step in range(2):
        give_gradients(parameters, step)
        poison(parameters)
        opt.step()
    for attempt in range(2):
        with pytest.raises(TrainingDivergedError, match="max_consecutive_skips=2") as error:
            opt.step()
        assert f"{3 + attempt} steps in a row" in str(error.value)
        assert "w3 (1 NaN)" in str(error.value)
        assert error.value.culprits == [("w3", 1, 0, 0)]
    after = snapshot(opt)
    assert_same_bits({k: after[k] for k in before}, before)
    assert opt.consecutive_skips == 4
    give_gradients(parameters, 5)
    opt.step()
    assert opt.consecutive_skips == 0


def test_an_applied_step_resets_the_budget():
    p, opt = one(1.0, max_consecutive_skips=1)
    for norm in (NAN, 1.0, NAN, 1.0, NAN, 1.0):
        steps_with(opt, p, [norm])
    assert (opt.applied_steps, opt.skipped_steps) == (3, 3)


def test_a_rule_whose_loss_is_never_passed_gives_a_warning(caplog):
    p, opt = one(1.0, spike={"recontruction": Threshold(max=9.0), "grad_norm": Threshold(max=9.0)})
    with caplog.at_level("WARNING", logger="fastguard"):
        for _ in range(120):
            p.grad = torch.tensor([1.0])
            opt.step(loss={"reconstruction": 5.0})
    (message,) = (r.getMessage() for r in caplog.records)
    assert "'recontruction'" in message and "did you mean 'reconstruction'" in message
