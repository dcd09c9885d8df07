"""The wrapper works as an optimizer for schedulers, hooks and profilers."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from fastguard import GuardedOptimizer
from guardtest.guarded import SPIKES, adamw, parameters_of, train
from guardtest.training import give_gradients, new_parameters, poison


def test_it_is_a_torch_optimizer():
    opt = adamw()
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is opt.optimizer.param_groups
    assert opt.state is opt.optimizer.state
    assert opt.defaults is opt.optimizer.defaults
    assert "GuardedOptimizer" in repr(opt)
    assert "lr: 0.1" in repr(opt)


def test_a_learning_rate_may_be_a_tensor():
    parameters = new_parameters()
    opt = GuardedOptimizer(torch.optim.AdamW(parameters, lr=torch.tensor(0.25), fused=True))
    train(opt, [0])
    assert opt.records()[0].lr == 0.25


class Signs(torch.optim.Optimizer):
    """Updates by the sign of the gradient, without a learning rate."""

    def __init__(self, params, size=0.5):
        super().__init__(params, {"size": size})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["size"] * p.grad.sign()


def test_an_optimizer_may_have_no_learning_rate():
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(Signs([p]))
    for grad in ([1.0, -3.0], [math.nan, 1.0]):
        p.grad = torch.tensor(grad)
        opt.step()
    assert p.tolist() == [-0.5, 0.5]
    assert [r.action for r in opt.records()] == ["applied", "skipped"]


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
def test_schedulers_accept_a_guard(name):
    """Learning rates equal those of the bare optimizer; no warning about the order of steps."""
    opt = adamw()
    bare = torch.optim.AdamW(new_parameters(), lr=0.1, fused=True)
    scheduler, expected = SCHEDULERS[name](opt), SCHEDULERS[name](bare)
    needs_loss = name == "ReduceLROnPlateau"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # SequentialLR of torch 2.8 warns about its own calls.
        warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)
        for step in range(6):
            train(opt, [step], bad={0, 3})  # the first step is skipped
            give_gradients(parameters_of(bare), step)
            bare.step()
            for s in (scheduler, expected):
                s.step(1.0) if needs_loss else s.step()
            assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in bare.param_groups]
    assert {r.lr for r in opt.records()} != {0.1}
    assert opt.skipped_steps == 2


def test_a_scheduler_can_take_skips_into_account():
    """If the verdict stays on the device, the schedule advances even in skipped steps."""
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


def test_a_pre_hook_may_change_the_arguments_of_step():
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


BAD_GROUPS = {
    "max_norm": (lambda: {"max_norm": 1.0}, ValueError, r"max_norm=1.0, but clip_scope='global'"),
    "clip_value": (lambda: {"clip_value": -1.0}, ValueError, r"clip_value=-1.0 must be >= 0"),
    "differentiable": (lambda: {"differentiable": True}, ValueError, "differentiable=True"),
    "a complex tensor": (lambda: {"params": a_complex()}, TypeError, "complex64.*leave"),
    "complex": (lambda: {"params": [a_complex()]}, TypeError, "complex64.*leave"),
    "an iterator": (lambda: {"params": iter([a_complex()])}, TypeError, "complex64.*leave"),
    "pairs": (lambda: {"params": [("w", a_complex())]}, TypeError, "w is torch.complex64.*leave"),
    "a set": (lambda: {"params": set(new_parameters())}, TypeError, "set"),
    "numbers": (lambda: {"params": [1.0]}, TypeError, "float"),
}


def a_complex():
    return nn.Parameter(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_bad_param_group_is_refused_and_not_added(case):
    make, error, message = BAD_GROUPS[case]
    parameters = new_parameters()
    opt = adamw(parameters[:2], flat_buckets=True)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": new_parameters([(2,)]), **make()})
    for no_group in (new_parameters(), {"lr": 0.1}):
        with pytest.raises(TypeError, match="pass a dict with 'params'"):
            opt.add_param_group(no_group)
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": iter(parameters[2:])})
    train(opt, [0])
    assert opt.applied_steps == 1
    assert opt.param_groups[1]["params"] == parameters[2:]


def test_frozen_parameters_are_not_changed():
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
    """Nothing global holds a reference to parameters or state."""
    opt = adamw(max_norm=1.0, spike=SPIKES)
    train(opt, range(2))
    dead = weakref.ref(opt), weakref.ref(parameters_of(opt)[0])
    del opt
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
