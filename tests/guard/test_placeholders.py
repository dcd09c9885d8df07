"""Memory estimates: under FakeTensorMode, a guard can be created and can step.

The other parts of a training loop also work, but there are no records and no snapshots.
"""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fastguard.optim

OPTIMIZERS = {
    "SGD": lambda ps: optim.SGD(ps, lr=0.1),
    "fused SGD with momentum": lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda ps: optim.AdamW(ps),
    "foreach AdamW": lambda ps: optim.AdamW(ps, foreach=True),
    "fused AdamW": lambda ps: optim.AdamW(ps, fused=True),
    "NAdam": lambda ps: optim.NAdam(ps),
}
GUARDS = {
    "default": {},
    "clip": {"max_norm": 1.0},
    "zero": {"nonfinite": "zero", "norm_type": float("inf")},
    "raise": {"nonfinite": "raise"},
    "propagate": {"nonfinite": "propagate", "max_norm": 1.0},
    "rules": {
        "spike": {"grad_norm": fastguard.SpikeRule(), "loss": fastguard.Threshold(max=100.0)},
        "max_consecutive_skips": 3,
    },
    "group": {"clip_scope": "group", "max_norm": 1.0},
    "tensor": {"clip_scope": "tensor", "max_norm": 1.0},
    "flat": {"flat_buckets": True, "max_norm": 1.0},
    "agc": {"max_norm": fastguard.AGC(0.1), "clip_scope": "unit"},
}


def train(make, guard, steps=3):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    opt = fastguard.GuardedOptimizer(
        make(model.parameters()), named_parameters=model.named_parameters(), **guard
    )
    for _ in range(steps):
        opt.zero_grad()
        loss = model(torch.randn(3, 4)).square().mean()
        loss.backward()
        opt.step(loss=loss)
    opt.load_state_dict(opt.state_dict())
    return model, opt


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_steps_of_placeholders_are_applied_without_records(make, guard):
    with FakeTensorMode():
        _, opt = train(OPTIMIZERS[make], GUARDS[guard])
        assert opt.records() == [] and opt.flush() == []
        if make != "SGD":
            assert len(opt.state) == 4  # each parameter has state
    _, real = train(OPTIMIZERS[make], GUARDS[guard])
    assert real.applied_steps == 3 and len(real.records()) == 3


def loop(prepare, steps=3, norm=False):
    """Takes a few steps and calls the result of `prepare(model, opt)` after each step."""
    layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Linear(8, 2)]
    model = nn.Sequential(*layers)
    opt = fastguard.GuardedOptimizer(optim.AdamW(model.parameters()), max_norm=1.0)
    after = prepare(model, opt)
    for _ in range(steps):
        opt.zero_grad()
        batch = torch.randn(3, 4)
        loss = model(batch).square().mean()
        loss.backward()
        opt.step(loss=loss)
        after(loss, batch)
    return model, opt


def with_rollback(model, opt):
    rollback = fastguard.Rollback(opt, {"model": model}, every=1)

    def after(loss, batch):
        assert rollback.step() is None and rollback.snapshots == []

    return after


def with_meter(model, opt):
    meter = fastguard.LossMeter()

    def after(loss, batch):
        meter.update(loss, weight=len(batch))
        meter.update({"a": loss, "b": 2.0})
        assert meter.compute().batches == 0

    return after


def with_activations(mode):
    def prepare(model, opt):
        guard = fastguard.ActivationGuard(model, mode=mode, limit=10.0)

        def after(loss, batch):
            with pytest.raises(ValueError, match="FakeTensorMode"):
                guard.counts()

        return after

    return prepare


def with_checked_batches(model, opt):
    def after(loss, batch):
        check = fastguard.check_batch((batch, torch.ones(3, dtype=torch.bool)), high=1.0)
        assert check.problems() == [] and len(check.signals()) == 2

    return after


def with_buffers(model, opt):
    buffers = fastguard.protect_buffers(model, opt)

    def after(loss, batch):
        assert buffers.mended == 0

    return after


def with_counters(model, opt):
    seen = []
    opt.add_sink(seen.append)

    def after(loss, batch):
        assert opt.applied_steps == opt.skipped_steps == opt.consecutive_skips == 0
        assert seen == opt.history == [] and opt.lifetime.steps == 0

    return after


def with_measures(model, opt):
    def after(loss, batch):
        assert fastguard.measure_grads(model.parameters()).culprits() == []

    return after


BESIDE = {
    "Rollback": with_rollback,
    "LossMeter": with_meter,
    "ActivationGuard": with_activations("count"),
    "cleaning ActivationGuard": with_activations("clean"),
    "check_batch": with_checked_batches,
    "protect_buffers": with_buffers,
    "counters": with_counters,
    "measure_grads": with_measures,
}


@pytest.mark.parametrize("beside", BESIDE)
def test_other_features_accept_placeholders(beside):
    with FakeTensorMode():
        loop(BESIDE[beside], norm=True)


def test_a_rollback_of_placeholders_has_no_snapshot():
    with FakeTensorMode():
        model, opt = loop(lambda *_: lambda *_: None)
        rollback = fastguard.Rollback(opt, {"model": model})
        with pytest.raises(fastguard.TrainingDivergedError, match=r"no snapshot.*FakeTensorMode"):
            rollback.trigger()


def test_a_store_refuses_placeholders(tmp_path):
    with FakeTensorMode(), fastguard.CheckpointStore(tmp_path) as store:
        model, _ = loop(lambda *_: lambda *_: None)
        assert store.maybe_save({"model": model}, step=1, every=2) is None
        with pytest.raises(ValueError, match=r"model\.0\.weight is a FakeTensor.*no data to save"):
            store.maybe_save({"model": model}, step=2, every=2)
        assert store.list() == ()


@pytest.mark.parametrize("lr", [1e-3, "tensor"])
def test_copies_of_a_guard_share_the_mode(lr):
    with FakeTensorMode() as mode:
        lr = torch.tensor(1e-3) if lr == "tensor" else lr
        model = nn.Linear(4, 2)
        opt = fastguard.GuardedOptimizer(optim.AdamW(model.parameters(), lr=lr), max_norm=1.0)
        model(torch.ones(1, 4)).sum().backward()
        opt.step()
        twin = copy.deepcopy(opt)
        (p, *_), (kept, *_) = twin.param_groups[0]["params"], twin.state.values()
        assert p.fake_mode is kept["exp_avg"].fake_mode is mode
        assert p is not model.weight and kept["exp_avg"] is not opt.state[model.weight]["exp_avg"]


CRASH = """
import copy, torch, fastguard
from fastguard.gradients.tensor_parts import cloned
from torch._subclasses.fake_tensor import FakeTensorMode

for _ in range(20):
    with FakeTensorMode():
        model = torch.nn.Linear(2, 2)
        opt = fastguard.GuardedOptimizer(torch.optim.AdamW(model.parameters()), max_norm=1.0)
        model(torch.ones(1, 2)).sum().backward()
        opt.step()
        fastguard.Rollback(opt, {"model": model})
        copy.deepcopy(opt)
        cloned(model.weight)
junk = [torch.randn(7) for _ in range(2000)]
"""


def test_no_copy_of_a_placeholder_corrupts_the_heap():
    # copy.deepcopy of a FakeTensor copies its mode, and the weak references of the mode are then
    # released twice.
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_wrappers_of_several_gradients_are_refused_by_name():
    p = nn.Parameter(TwoTensor(torch.zeros(2), torch.zeros(2)))
    opt = fastguard.GuardedOptimizer(optim.SGD([p], lr=0.1))
    p.grad = TwoTensor(torch.ones(2), torch.full((2,), float("nan")))
    with pytest.raises(TypeError, match=r"type TwoTensor.*single decision"):
        opt.step()
    assert p.a.tolist() == [0, 0] and opt.steps_taken == 0


@pytest.mark.parametrize("flat", ["flat_buckets", "flat_parameters"])
@pytest.mark.parametrize("fused", [False, True])
def test_flat_buckets_refuse_wrapped_gradients_by_name(flat, fused):
    """A plain buffer would lose the second gradient of each wrapper."""
    p = nn.Parameter(torch.ones(2))
    opt = fastguard.GuardedOptimizer(optim.AdamW([p], fused=fused), **{flat: True})
    p.grad = TwoTensor(torch.ones(2), torch.full((2,), float("nan")))
    with pytest.raises(TypeError, match=r"a gradient is a TwoTensor.*flat buckets"):
        opt.step()
    assert opt.steps_taken == 0
    p.grad = torch.ones(2)
    opt.step()
    assert opt.applied_steps == 1


def test_flat_buckets_refuse_a_wrapper_whose_gradient_is_not_known():
    """Autograd would add both of its gradients to one buffer."""
    p = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    with pytest.raises(TypeError, match=r"parameter 0 is a TwoTensor.*flat buckets"):
        fastguard.GuardedOptimizer(optim.SGD([p]), flat_buckets=True)


def test_features_that_read_weights_from_memory_refuse_wrappers_by_name():
    p = nn.Parameter(TwoTensor(torch.ones(2, 3), torch.ones(2, 3)))
    p.grad = torch.ones(2, 3)
    opt = fastguard.GuardedOptimizer(
        optim.SGD([p]), max_norm=fastguard.AGC(), clip_scope="unit", named_parameters=[("w", p)]
    )
    with pytest.raises(TypeError, match="w is a TwoTensor, whose units"):
        opt.step()
    assert opt.steps_taken == 0
    with pytest.raises(TypeError, match="parameter 0 is a TwoTensor, whose units"):
        fastguard.clip_grad_adaptive_([p])
    with pytest.raises(TypeError, match="parameter 0 of param group 0 is a TwoTensor"):
        fastguard.optim.AdamW([p])
