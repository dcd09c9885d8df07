"""torch.amp.GradScaler with a guarded optimizer, with and without `unscale_`."""

import math

import pytest
import torch
from torch import nn

import fastguard.stages.measure
from fastguard import GuardedOptimizer, NonFiniteGradError, SpikeRule
from guardtest.training import assert_same_bits, new_parameters, poison, snapshot

SCALE = 2.0**10
BAD = {2, 3, 6}


def scaler(scale=SCALE):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)


def backward(scaler, parameters, step, bad=BAD):
    """Computes scaled gradients, with one Inf in bad steps as after an overflow."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = None
    loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in parameters)
    scaler.scale(loss).backward()
    if step in bad:
        poison(parameters, math.inf)


def torch_recipe(fused, max_norm, steps):
    parameters = new_parameters()
    opt = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    amp, scales = scaler(), []
    for step in range(steps):
        backward(amp, parameters, step)
        amp.unscale_(opt)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        amp.step(opt)
        amp.update()
        scales.append(amp.get_scale())
    return opt, scales


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("max_norm", [None, 1e6, 0.5], ids=str)
def test_scales_and_weights_equal_those_of_torchs_recipe(fused, unscale, max_norm, flat):
    """They are bitwise equal if nothing is clipped, because the scale is a power of two."""
    parameters = new_parameters()
    opt = GuardedOptimizer(
        torch.optim.AdamW(parameters, lr=0.1, fused=fused), max_norm=max_norm, flat_buckets=flat
    )
    amp, scales = scaler(), []
    for step in range(9):
        backward(amp, parameters, step)
        before = snapshot(opt)
        if unscale:
            amp.unscale_(opt)
        amp.step(opt)
        amp.update()
        scales.append(amp.get_scale())
        if step in BAD:
            assert_same_bits(snapshot(opt), before)
    alone, expected = torch_recipe(fused, max_norm, 9)
    assert scales == expected
    assert scales[2] == scales[1] / 2
    if max_norm != 0.5:
        assert_same_bits(snapshot(opt), snapshot(alone))
    else:
        ours, theirs = snapshot(opt), snapshot(alone)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-7)
    assert (opt.applied_steps, opt.skipped_steps) == (6, 3)


@pytest.mark.parametrize("max_norm", [None, 1e6, 0.5], ids=str)
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_the_guard_reads_the_gradients_once(unscale, max_norm, monkeypatch):
    """Unscaling happens in the pass that measures; the scaler's own check is separate."""
    reads = []

    def measure(*args):
        reads.append(args)
        return fastguard.stages.measure.measure(*args)

    monkeypatch.setattr("fastguard.guard.guarded.measure", measure)
    parameters = new_parameters()
    opt = GuardedOptimizer(torch.optim.AdamW(parameters, fused=True), max_norm=max_norm)
    amp = scaler()
    for step in range(3):
        backward(amp, parameters, step)
        if unscale:
            amp.unscale_(opt)
        amp.step(opt)
        amp.update()
    assert len(reads) == 3


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_records_describe_unscaled_gradients(unscale):
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=1.0), max_norm=1.0)
    amp = scaler()
    for bad in (False, True):
        p.grad = None
        amp.scale((p * torch.tensor([3.0, 4.0])).sum()).backward()
        if bad:
            p.grad[1] = math.inf
        if unscale:
            amp.unscale_(opt)
        amp.step(opt)
        amp.update()
    applied, skipped = opt.records()
    assert applied.total_norm == 5.0
    assert (applied.action, applied.clip_coef) == ("clipped", pytest.approx(0.2, rel=1e-5))
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6, -0.8]))
    assert (skipped.action, skipped.reason) == ("skipped", "loss_scale")
    assert skipped.total_norm == 3.0
    assert skipped.culprits == (("parameter 0", 0, 1, 0),)


def test_a_real_overflow_of_the_scaled_gradient_is_skipped():
    p = nn.Parameter(torch.ones(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=1.0))
    amp = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    amp.scale((p * 1e9).sum()).backward()  # 1e9 * 2**100 overflows float32
    amp.step(opt)
    amp.update()
    assert p.tolist() == [1.0, 1.0]
    assert amp.get_scale() == 2.0**99
    assert opt.records()[0].posinf == 2


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
def test_found_inf_of_the_scaler_is_a_sum_over_devices(fused):
    """For two devices the sum is 2.0, and the fused kernel would apply the step."""
    parameters = new_parameters()
    inner = torch.optim.AdamW(parameters, fused=fused)
    opt = GuardedOptimizer(inner)
    seen = []
    plain_step = inner.step
    inner.step = lambda: (seen.append(getattr(inner, "found_inf", None)), plain_step())
    for p in parameters:
        p.grad = torch.ones_like(p)
    before = snapshot(opt)
    opt.grad_scale, opt.found_inf = None, torch.full((), 2.0)
    opt.step()
    after = snapshot(opt)
    assert_same_bits({k: after[k] for k in before}, before)
    assert seen == ([torch.tensor(1.0)] if fused else [])
    assert opt.records()[0].action == "skipped"


@pytest.mark.parametrize("clip_value", [None, 2.0])
def test_clip_value_limits_unscaled_elements(clip_value):
    p = nn.Parameter(torch.zeros(3))
    opt = GuardedOptimizer(torch.optim.SGD([{"params": [p], "clip_value": clip_value}], lr=1.0))
    amp = scaler()
    amp.scale((p * torch.tensor([3.0, -4.0, 1.0])).sum()).backward()
    amp.step(opt)
    assert (-p).tolist() == ([3.0, -4.0, 1.0] if clip_value is None else [2.0, -2.0, 1.0])


def test_zero_mode_cleans_what_it_counted_and_nothing_else():
    """This runs at the minimum scale, which cannot be lowered."""
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=1.0), nonfinite="zero")
    amp = scaler(1.0)
    amp.scale((p * torch.tensor([3.0, 4.0])).sum()).backward()
    p.grad[1] = math.inf
    amp.step(opt)
    amp.update()
    assert p.tolist() == [-3.0, 0.0]
    assert opt.records()[0].action == "sanitized"
    assert amp.get_scale() == 0.5
    # An overflow that only the scaler found, on another device: there is nothing to clean.
    p.grad = torch.ones(2)
    opt.grad_scale, opt.found_inf = None, torch.ones(())
    opt.step()
    assert p.tolist() == [-3.0, 0.0]


def test_propagate_mode_leaves_the_decision_to_the_scaler():
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=1.0), nonfinite="propagate", max_norm=1.0)
    amp = scaler()
    amp.scale(p.sum()).backward()
    p.grad[1] = math.inf
    amp.step(opt)
    assert p.tolist() == [0.0, 0.0]


def test_raise_mode_leaves_no_scale_behind():
    """The scaler multiplies an existing scale, so the next step would be scaled twice."""
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=1.0), nonfinite="raise")
    amp = scaler(1.0)
    for step in range(2):
        p.grad = None
        amp.scale(p.sum()).backward()
        if step == 0:
            p.grad[1] = math.inf
            with pytest.raises(NonFiniteGradError, match="parameter 0"):
                amp.step(opt)
            assert p.tolist() == [0.0, 0.0]
        else:
            amp.step(opt)
        amp.update()
    assert p.tolist() == [-1.0, -1.0]
    p.grad = torch.ones(2)
    opt.step()  # a step without a scaler
    assert p.tolist() == [-2.0, -2.0]


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_spike_rules_judge_unscaled_norms(unscale):
    """The scale is halved and grows; the baseline does not change."""
    p = nn.Parameter(torch.zeros(1))
    opt = GuardedOptimizer(
        torch.optim.SGD([p], lr=1.0), spike=SpikeRule(window=4, warmup=2, sigma=3.0)
    )
    amp = torch.amp.GradScaler("cpu", init_scale=2.0, growth_factor=64.0, growth_interval=1)
    for value in (1.0, 1.0, 1.0, 1.0, 5.0, 1.0):
        p.grad = None
        amp.scale((p * value).sum()).backward()
        if unscale:
            amp.unscale_(opt)
        amp.step(opt)
        amp.update()
    assert [r.action == "skipped" for r in opt.records()] == [False] * 4 + [True, False]
