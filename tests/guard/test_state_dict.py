"""State dicts: exact resume, refused state dicts, and values that loading resets.

test_foreign_states.py loads states of other optimizers.
"""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastguard import GuardedOptimizer, SpikeRule, Threshold
from fastguard.guard.on_device import OnDevice
from fastguard.guard.read_first import ReadFirst
from guardtest.guarded import SPIKES, adamw, parameters_of, train
from guardtest.training import (
    SHAPES,
    assert_same_bits,
    give_gradients,
    new_parameters,
    poison,
    snapshot,
)


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(fused, flat):
    """Spikes after the resume depend on values accepted before it."""
    bad = {1, 5, 9}

    def norms(opt, steps):
        for step in steps:
            give_gradients(parameters_of(opt), step)
            if step in bad:
                poison(parameters_of(opt))
            if step == 10:  # a spike only relative to the earlier baseline
                for p in parameters_of(opt):
                    p.grad *= 30
            opt.step(loss=2.0 if step != 11 else 9.0)

    options = {"max_norm": 1.0, "spike": SPIKES, "flat_buckets": flat}
    straight = adamw(fused=fused, **options)
    norms(straight, range(14))

    first = adamw(fused=fused, **options)
    norms(first, range(7))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    weights = new_parameters()
    with torch.no_grad():
        for p, q in zip(weights, parameters_of(first), strict=True):
            p.copy_(q)
    second = adamw(weights, fused=fused, **options)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.skipped_steps == 2
    norms(second, range(7, 14))

    assert_same_bits(snapshot(second), snapshot(straight))
    resumed, expected = (
        [replace(record, time=0.0) for record in records]
        for records in (second.records(), straight.records()[7:])
    )
    assert repr(resumed) == repr(expected)
    for key, value in straight.state_dict()["fastguard"].items():
        other = second.state_dict()["fastguard"][key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert straight.skipped_steps == 5  # three NaN, one gradient spike, one loss spike


def test_a_saved_state_does_not_change_when_training_continues():
    opt = adamw(spike=SPIKES)
    train(opt, range(3))
    state = opt.state_dict()["fastguard"]
    counters, rings = state["counters"].clone(), state["rings"].clone()
    train(opt, range(3, 6))
    assert torch.equal(state["counters"], counters)
    assert torch.equal(state["rings"], rings)
    opt.load_state_dict({**opt.state_dict(), "fastguard": state})
    train(opt, range(3))
    assert torch.equal(state["counters"], counters)


def test_a_state_dict_without_a_guard_loads_and_warns_once():
    bare = torch.optim.AdamW(new_parameters(), lr=0.1, fused=True)
    for step in range(2):
        give_gradients(bare.param_groups[0]["params"], step)
        bare.step()
    opt = adamw(spike=SPIKES)
    train(opt, range(5), bad={1})
    with pytest.warns(UserWarning, match="no 'fastguard' entry") as caught:
        opt.load_state_dict(bare.state_dict())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (opt.applied_steps, opt.skipped_steps) == (0, 0)
    assert opt.state[parameters_of(opt)[0]]["step"] == 2


def test_the_bare_optimizer_loads_a_guarded_state_dict():
    opt = adamw(max_norm=1.0)
    train(opt, range(3))
    bare = torch.optim.AdamW(new_parameters(), lr=0.1, fused=True)
    bare.load_state_dict(opt.state_dict())
    assert bare.state[bare.param_groups[0]["params"][0]]["step"] == 3


def damaged(state, **changes):
    return {**state, "fastguard": {**state["fastguard"], **changes}}


def of_shape(*shape):
    """Returns the state of the same configuration with a parameter of another shape."""
    opt = adamw(new_parameters([shape, *SHAPES[1:]]), spike=SPIKES)
    train(opt, range(2))
    return opt.state_dict()


def of_other(cls, **kwargs):
    """Returns the state of another optimizer with the same guard."""
    opt = GuardedOptimizer(cls(new_parameters(), lr=0.1, **kwargs), spike=SPIKES)
    train(opt, range(2))
    return opt.state_dict()


OTHER_CONFIGURATIONS = {
    "no rules": (lambda s: adamw().state_dict(), r"spike rules \[\] with windows \[\]"),
    "other window": (
        lambda s: adamw(spike={**SPIKES, "loss": SpikeRule(window=5, warmup=2)}).state_dict(),
        "construct the guard with the same spike=",
    ),
    "other signal": (
        lambda s: adamw(
            spike={"grad_norm": SPIKES["grad_norm"], "ce": SPIKES["loss"]}
        ).state_dict(),
        "'ce'",
    ),
    "other rule": (
        lambda s: adamw(spike={**SPIKES, "loss": Threshold(max=3.0)}).state_dict(),
        "windows",
    ),
    "newer version": (lambda s: damaged(s, version=99), "version 99"),
    "not a dict": (lambda s: {**s, "fastguard": 3}, r"state_dict\['fastguard'\] is 3"),
    "incomplete": (
        lambda s: {**s, "fastguard": {"version": 1, "signals": []}},
        "lacks windows_of, windows, rings, counters",
    ),
    "other shape": (lambda s: damaged(s, counters=torch.zeros(2)), "counters of shape"),
    "no tensor": (lambda s: damaged(s, rings=None), "rings of shape None"),
    "other parameters": (
        lambda s: {**s, "param_groups": [{**s["param_groups"][0], "params": [0]}]},
        "parameter group",
    ),
    "a limit without its scope": (
        lambda s: {**s, "param_groups": [{**s["param_groups"][0], "max_norm": 1.0}]},
        "clip_scope='global'",
    ),
    "a bad clip_value": (
        lambda s: {**s, "param_groups": [{**s["param_groups"][0], "clip_value": -1.0}]},
        "clip_value=-1.0",
    ),
    "nothing": (lambda s: None, "is a NoneType; pass the result"),
    "a list": (lambda s: [s], "is a list; pass the result"),
    "empty": (lambda s: {}, "lacks 'state' and 'param_groups'"),
    "without state": (lambda s: {k: s[k] for k in s if k != "state"}, "lacks 'state'"),
    "state of a model": (lambda s: {"0.weight": torch.ones(2)}, "lacks 'state'"),
    "state is no dict": (lambda s: {**s, "state": None}, r"\['state'\] is a NoneType"),
    "groups are no list": (lambda s: {**s, "param_groups": {}}, r"\['param_groups'\] is a dict"),
    "groups are no dicts": (lambda s: {**s, "param_groups": [3]}, r"\['param_groups'\]\[0\] is"),
    "a group without params": (
        lambda s: {**s, "param_groups": [{"lr": 0.1}]},
        r"\['param_groups'\]\[0\] lacks 'params'",
    ),
    "SGD": (lambda s: of_other(torch.optim.SGD), "param group 0 has no betas, eps.*AdamW"),
    "SGD with momentum": (
        lambda s: of_other(torch.optim.SGD, momentum=0.9),
        "param group 0 has no betas, eps.*AdamW",
    ),
    "RMSprop": (lambda s: of_other(torch.optim.RMSprop), "param group 0 has no betas"),
    "Adamax": (lambda s: of_other(torch.optim.Adamax), "has no exp_avg_sq"),
    "other size": (lambda s: of_shape(4, 3), r"exp_avg of shape \(4, 3\), .* needs \(3, 4\)"),
    "one element": (lambda s: of_shape(1), r"exp_avg of shape \(1,\)"),
    "a scalar": (lambda s: of_shape(), r"exp_avg of shape \(\)"),
    "no step": (
        lambda s: {**s, "state": {**s["state"], 1: {"exp_avg": torch.zeros(5)}}},
        "has no step, exp_avg_sq",
    ),
    "a state that is no dict": (
        lambda s: {**s, "state": {**s["state"], 0: torch.zeros(3, 4)}},
        "the state of parameter 0 is a Tensor",
    ),
}


@pytest.mark.parametrize("case", OTHER_CONFIGURATIONS)
def test_a_state_of_another_configuration_is_refused_and_changes_nothing(case):
    opt = adamw(spike=SPIKES)
    train(opt, range(5), bad={4})
    make, message = OTHER_CONFIGURATIONS[case]
    other = make(opt.state_dict())
    guard = other.get("fastguard") if isinstance(other, dict) else None
    if isinstance(guard, dict) and "counters" in guard:
        guard["counters"] += 1  # must not be loaded
    before, guard = snapshot(opt), opt.state_dict()["fastguard"]
    groups = copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(TypeError if case in ("nothing", "a list") else ValueError, match=message):
        opt.load_state_dict(other)
    assert_same_bits(snapshot(opt), before)
    assert opt.state_dict()["param_groups"] == groups
    after = opt.state_dict()["fastguard"]
    for key in ("counters", "windows", "rings"):
        assert torch.equal(after[key], guard[key])
    train(opt, [5])
    assert opt.applied_steps == 5


def test_loading_selects_the_stepper_for_the_loaded_param_groups():
    """A state dict may change `fused`; other implementations ignore found_inf."""
    opt = adamw(fused=True)
    assert isinstance(opt._stepper, OnDevice)
    other = adamw(fused=False)
    train(other, range(2))
    opt.load_state_dict(other.state_dict())
    assert type(opt._stepper) is ReadFirst
    before = snapshot(opt)
    train(opt, [2], bad={2})
    assert_same_bits(snapshot(opt), before)
    train(opt, [3])
    assert opt.applied_steps == 3


def test_loading_replaces_the_param_groups_and_the_guard_follows():
    opt = adamw()
    old_groups = opt.param_groups
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is not old_groups
    assert opt.param_groups is opt.optimizer.param_groups
    opt.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in parameters_of(opt)]
    train(opt, [0])
    assert all(map(torch.equal, parameters_of(opt), before))


def test_loading_discards_losses_of_the_abandoned_run():
    opt = adamw()
    state = opt.state_dict()
    opt.observe(float("nan"))
    opt.load_state_dict(state)
    train(opt, [0], loss=False)
    assert opt.records()[0].losses == {}
    assert opt.applied_steps == 1


def test_loading_resets_the_skips_of_the_abandoned_run():
    """If the budget is checked before a step, it would stop the resumed run immediately."""
    opt = adamw(max_consecutive_skips=3)
    state = opt.state_dict()
    train(opt, range(3), bad=range(3))
    opt.load_state_dict(state)
    opt._deliver(before=False)
    assert opt._recorder.wait() is None
    assert opt.consecutive_skips == 0
    assert len(opt.records()) == 3  # records remain


def test_a_loaded_clip_value_for_complex_parameters_is_refused():
    def guard():
        return GuardedOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2) * 1j)], lr=0.1))

    opt = guard()
    saved = opt.state_dict()
    saved["param_groups"][0]["clip_value"] = 1.0
    with pytest.raises(TypeError, match=r"clip_value=1.0 and a complex parameter"):
        opt.load_state_dict(saved)
    assert "clip_value" not in opt.param_groups[0]
