"""The wrapper is an optimizer to everybody else: to schedulers, hooks, copies and checkpoints."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from fastguard import GuardedOptimizer, SpikeRule, Threshold
from fastguard.stepping import FoundInf, ReadFirst
from guardtest.training import (
    assert_same_bits,
    give_gradients,
    new_parameters,
    poison,
    snapshot,
)

SPIKES = {"grad_norm": SpikeRule(window=6, warmup=3), "loss": SpikeRule(window=4, warmup=2)}


def adamw(parameters=None, fused=True, **options):
    inner = torch.optim.AdamW(parameters or new_parameters(), lr=0.1, fused=fused)
    return GuardedOptimizer(inner, **options)


def parameters_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def train(opt, steps, bad=(), loss=True):
    for step in steps:
        give_gradients(parameters_of(opt), step)
        if step in bad:
            poison(parameters_of(opt))
        opt.step(loss=1.0 + step % 3 if loss else None)


def test_it_is_a_torch_optimizer():
    opt = adamw()
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is opt.optimizer.param_groups
    assert opt.state is opt.optimizer.state
    assert opt.defaults is opt.optimizer.defaults
    assert "GuardedOptimizer" in repr(opt)
    assert "lr: 0.1" in repr(opt)


# Schedulers.

SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.5, total_steps=10),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_take_it_for_an_optimizer(name):
    """The same learning rates as on the bare optimizer, and no warning about the order of steps."""
    opt = adamw()
    bare = torch.optim.AdamW(new_parameters(), lr=0.1, fused=True)
    scheduler, expected = SCHEDULERS[name](opt), SCHEDULERS[name](bare)
    needs_loss = name == "ReduceLROnPlateau"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            train(opt, [step], bad={0, 3})  # the first step of all is skipped
            give_gradients(parameters_of(bare), step)
            bare.step()
            for s in (scheduler, expected):
                s.step(1.0) if needs_loss else s.step()
            assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in bare.param_groups]
    assert {r.lr for r in opt.records()} != {0.1}
    assert opt.skipped_steps == 2


def test_a_scheduler_can_know_of_skips():
    """Elsewhere a step skipped on the device still moves the schedule."""
    opt = adamw()
    scheduler = schedulers.LambdaLR(opt, lambda applied: 1.0 / (1 + applied))
    for step in range(6):
        train(opt, [step], bad={1, 2})
        if opt.consecutive_skips == 0:
            scheduler.step()
    assert scheduler.last_epoch == opt.applied_steps == 4


# Hooks and profiler.


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_step_hooks_run_once_around_the_guarded_step(fused):
    opt = adamw(fused=fused)
    order = []
    opt.register_step_pre_hook(lambda o, *_: order.append("pre"))
    opt.register_step_post_hook(lambda o, *_: order.append("post"))
    opt.optimizer.register_step_pre_hook(lambda o, *_: order.append("inner pre"))
    opt.optimizer.register_step_post_hook(lambda o, *_: order.append("inner post"))
    train(opt, [0])
    assert order == ["pre", "inner pre", "inner post", "post"]
    order.clear()
    train(opt, [1], bad={1})
    assert order == ["pre", "post"]


def test_a_pre_hook_may_change_what_step_is_given():
    opt = adamw()
    opt.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "tag": "from the hook"}))
    train(opt, [0])
    assert opt.records()[0].tag == "from the hook"


def test_state_dict_hooks_run_on_the_wrapper():
    opt = adamw()
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda o, sd: {**sd, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda o, sd: {k: sd[k] for k in sd if k != "extra"})
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    saved = opt.state_dict()
    assert saved["extra"] == 1
    opt.load_state_dict(saved)
    assert seen == ["pre", "loaded"]
    assert "extra" in saved


def test_the_profiler_shows_the_guarded_step():
    opt = adamw()
    give_gradients(parameters_of(opt), 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    names = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#GuardedOptimizer.step" in names
    assert "Optimizer.step#AdamW.step" in names


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    opt = adamw()
    give_gradients(parameters_of(opt), 0)
    opt.zero_grad(set_to_none=set_to_none)
    for p in parameters_of(opt):
        assert p.grad is None if set_to_none else not p.grad.any()


# Param groups.


@pytest.mark.parametrize("through", ["wrapper", "inner"])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_a_param_group_added_later_is_guarded(through, scope, flat):
    old, new = new_parameters([(3,), (4,)])
    model_names = [("old", old), ("new", new)]
    opt = adamw(
        [old], named_parameters=model_names, clip_scope=scope, flat_buckets=flat, max_norm=1.0
    )
    train(opt, [0])
    target = opt if through == "wrapper" else opt.optimizer
    target.add_param_group({"params": [new], "lr": 0.2})
    train(opt, [1, 2], bad={2})
    records = opt.records()
    assert [r.action for r in records] == ["clipped", "clipped", "skipped"]
    assert records[-1].culprits == (("new", 1, 0, 0),)
    assert opt.last.clip_coef.shape == ({"global": 1, "group": 2, "tensor": 2}[scope],)


def test_a_bad_param_group_is_refused_and_not_added():
    opt = adamw()
    with pytest.raises(ValueError, match=r"max_norm=1.0, but clip_scope='global'"):
        opt.add_param_group({"params": new_parameters([(2,)]), "max_norm": 1.0})
    with pytest.raises(ValueError, match=r"clip_value=-1.0 must be >= 0"):
        opt.add_param_group({"params": new_parameters([(2,)]), "clip_value": -1.0})
    assert len(opt.param_groups) == 1


def test_frozen_parameters_are_left_alone():
    a, b = new_parameters([(3,), (4,)])
    b.requires_grad_(False)
    for flat in (False, True):
        opt = adamw([a, b], flat_buckets=flat)
        before = b.clone()
        for step in range(3):
            opt.zero_grad()
            (a * step).sum().backward()
            opt.step()
        assert torch.equal(b, before)
        assert opt.applied_steps == 3


def test_names_come_from_the_model_or_the_param_group_or_are_numbers():
    model = nn.Linear(2, 1)
    named = torch.optim.SGD([{"params": model.named_parameters()}], lr=0.1)
    for inner, options, expected in (
        (torch.optim.SGD(model.parameters(), lr=0.1), {}, "parameter 1"),
        (named, {}, "bias"),
        (named, {"named_parameters": [("mine", model.bias)]}, "mine"),
        (
            named,
            {"named_parameters": [("first", model.bias), ("second", model.bias)]},
            "first",
        ),
    ):
        opt = GuardedOptimizer(inner, **options)
        give_gradients(model.parameters(), 0)
        poison(list(model.parameters()))
        opt.step()
        assert opt.records()[0].culprits == ((expected, 1, 0, 0),)


def test_a_dropped_guard_is_freed():
    """Nothing global holds on to parameters or state."""
    opt = adamw(max_norm=1.0, spike=SPIKES)
    train(opt, range(2))
    dead = weakref.ref(opt), weakref.ref(parameters_of(opt)[0])
    del opt
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


# Copies.


def pickled(opt):
    return pickle.loads(pickle.dumps(opt))


def saved(opt):
    buffer = io.BytesIO()
    torch.save(opt, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_a_copy_goes_on_by_itself(copied, flat):
    """A scheduler puts a `step` on the instance, which belongs to the original."""
    parameters = new_parameters()
    names = [(f"w{i}", p) for i, p in enumerate(parameters)]
    opt = adamw(parameters, max_norm=1.0, spike=SPIKES, named_parameters=names, flat_buckets=flat)
    schedulers.LambdaLR(opt, lambda epoch: 1.0)
    opt.register_step_post_hook(lambda *_: None)
    train(opt, range(4), bad={2})
    twin = copied(opt)
    before = snapshot(opt)
    assert_same_bits(snapshot(twin), before)
    train(twin, range(4, 8), bad={5})
    assert_same_bits(snapshot(opt), before)
    assert (opt.applied_steps, twin.applied_steps) == (3, 6)
    train(opt, range(4, 8), bad={5})
    assert_same_bits(snapshot(twin), snapshot(opt))
    assert [r.culprits for r in twin.records()[-3:]] == [(("w3", 1, 0, 0),), (), ()]
    twin.add_param_group({"params": new_parameters([(7,)])})
    train(twin, [8])
    assert twin.applied_steps == 7


# State dict.


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(fused, flat):
    """Spikes judged after the resume depend on what was accepted before it."""
    bad = {1, 5, 9}

    def norms(opt, steps):
        for step in steps:
            give_gradients(parameters_of(opt), step)
            if step in bad:
                poison(parameters_of(opt))
            if step == 10:  # a spike only to whoever remembers
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
    assert repr(second.records()) == repr(straight.records()[7:])
    for key, value in straight.state_dict()["fastguard"].items():
        other = second.state_dict()["fastguard"][key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert straight.skipped_steps == 5  # three poisoned, one gradient spike, one loss spike


def test_a_saved_state_does_not_change_when_training_goes_on():
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


OTHER_CONFIGURATIONS = {
    "no rules": (lambda s: adamw().state_dict(), r"spike rules \[\] with windows \[\]"),
    "other window": (
        lambda s: adamw(spike={**SPIKES, "loss": SpikeRule(window=5, warmup=2)}).state_dict(),
        "construct it with the same spike=",
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
        "lacks windows_of, counters",
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
}


@pytest.mark.parametrize("case", OTHER_CONFIGURATIONS)
def test_a_state_of_another_configuration_is_refused_and_changes_nothing(case):
    opt = adamw(spike=SPIKES)
    train(opt, range(5), bad={4})
    make, message = OTHER_CONFIGURATIONS[case]
    other = make(opt.state_dict())
    if isinstance(other["fastguard"], dict) and "counters" in other["fastguard"]:
        other["fastguard"]["counters"] += 1  # nothing of it must arrive
    before, guard = snapshot(opt), opt.state_dict()["fastguard"]
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(other)
    assert_same_bits(snapshot(opt), before)
    after = opt.state_dict()["fastguard"]
    for key in ("counters", "windows", "rings"):
        assert torch.equal(after[key], guard[key])
    train(opt, [5])
    assert opt.applied_steps == 5


def test_loading_takes_the_road_of_the_loaded_param_groups():
    """A state dict brings its own `fused`; found_inf means nothing to the other implementations."""
    opt = adamw(fused=True)
    assert isinstance(opt._road, FoundInf)
    other = adamw(fused=False)
    train(other, range(2))
    opt.load_state_dict(other.state_dict())
    assert isinstance(opt._road, ReadFirst)
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


def test_loading_forgets_losses_of_the_abandoned_run():
    opt = adamw()
    state = opt.state_dict()
    opt.observe(float("nan"))
    opt.load_state_dict(state)
    train(opt, [0], loss=False)
    assert opt.records()[0].losses == {}
    assert opt.applied_steps == 1


def test_loading_forgets_the_skips_of_the_abandoned_run():
    """Where the budget is checked before a step, it would stop the resumed run at once."""
    opt = adamw(max_consecutive_skips=3)
    state = opt.state_dict()
    train(opt, range(3), bad=range(3))
    opt.load_state_dict(state)
    opt._deliver(before=False)
    assert opt._recorder.wait() is None
    assert opt.consecutive_skips == 0
    assert len(opt.records()) == 3  # what happened stays told


def test_a_learning_rate_may_be_a_tensor():
    parameters = new_parameters()
    opt = GuardedOptimizer(torch.optim.AdamW(parameters, lr=torch.tensor(0.25), fused=True))
    train(opt, [0])
    assert opt.records()[0].lr == 0.25
