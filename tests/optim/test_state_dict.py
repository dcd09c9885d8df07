"""State dicts: exact resume, exchange with torch, and rejection of other master modes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import fastguard.optim as guarded
from guardtest.updates import same_bits

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "master": dict(dtype=torch.bfloat16, master="float32"),
    "remainder": dict(dtype=torch.bfloat16, master="remainder"),
    "stochastic": dict(dtype=torch.bfloat16, rounding="stochastic", seed=5),
    "bf16 states": dict(state_dtype=torch.bfloat16),
}
KINDS = [guarded.AdamW, guarded.Adam, guarded.Lion, guarded.SGD]


def run(dtype: torch.dtype = torch.float32, seed: int = 0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((3, 5), (40_000,))]


def train(optimizer, parameters, steps):
    for step in steps:
        for i, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_continues_bit_for_bit(kind, setting):
    options = dict(SETTINGS[setting])
    dtype = options.pop("dtype", torch.float32)
    if kind is guarded.SGD:
        options["momentum"] = 0.9
    whole, parts = run(dtype), run(dtype)
    optimizer = kind(whole, **options)
    train(optimizer, whole, range(6))
    first = kind(parts, **options)
    train(first, parts, range(3))
    saved = through_a_file(first.state_dict())
    again = [torch.nn.Parameter(p.detach().clone()) for p in parts]
    second = kind(again, **options)
    second.load_state_dict(saved)
    train(second, again, range(3, 6))
    for p, q in zip(whole, again, strict=True):
        assert same_bits(p.detach(), q.detach())
        for key, value in optimizer.state[p].items():
            assert value.dtype == second.state[q][key].dtype
            assert torch.equal(value, second.state[q][key])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("AdamW", {}), ("AdamW", dict(amsgrad=True)), ("Adam", {}), ("SGD", dict(momentum=0.9))],
)
@pytest.mark.parametrize("foreach", [True, False])
def test_runs_continue_from_torch_and_in_torch(name, settings, foreach):
    theirs = run()
    reference = getattr(torch.optim, name)(theirs, lr=1e-2, foreach=foreach, **settings)
    train(reference, theirs, range(6))
    for first, then in ((torch.optim, guarded), (guarded, torch.optim)):
        parameters = run()
        a = getattr(first, name)(parameters, lr=1e-2, **settings)
        train(a, parameters, range(3))
        b = getattr(then, name)(parameters, lr=1.0, **settings)
        b.load_state_dict(through_a_file(a.state_dict()))
        assert b.param_groups[0]["lr"] == 1e-2
        train(b, parameters, range(3, 6))
        for p, q in zip(parameters, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_run_of_torchs_sgd_with_dampening_continues():
    settings = dict(lr=1e-2, momentum=0.9, dampening=0.5)
    theirs, ours = run(), run()
    reference = torch.optim.SGD(theirs, **settings)
    before = torch.optim.SGD(ours, **settings)
    train(reference, theirs, range(4))
    train(before, ours, range(2))
    after = guarded.SGD(ours, **settings)
    after.load_state_dict(before.state_dict())
    train(after, ours, range(2, 4))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("master", ["float32", "remainder"])
def test_a_master_starts_from_the_weights_of_a_torch_checkpoint(master):
    theirs = run(torch.bfloat16)
    before = torch.optim.AdamW(theirs, lr=1e-2)
    train(before, theirs, range(3))
    weights = [p.detach().clone() for p in theirs]
    after = guarded.AdamW(theirs, lr=1e-2, master=master)
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["master"] == master
    assert after.state[theirs[0]]["exp_avg"].dtype is torch.float32
    train(after, theirs, range(3, 4))
    state = after.state[theirs[0]]
    whole = (
        state["master"]
        if master == "float32"
        else guarded.bits.from_remainder(theirs[0].detach(), state["remainder"])
    )
    assert (whole - weights[0].float()).abs().max() <= 0.02


@pytest.mark.parametrize("master", ["float32", "remainder"])
def test_a_master_that_torch_has_cast_is_initialized_anew(master):
    parameters = run(torch.bfloat16)
    first = guarded.AdamW(parameters, lr=1e-2, master=master)
    train(first, parameters, range(2))
    middle = torch.optim.AdamW(parameters)
    middle.load_state_dict(first.state_dict())
    train(middle, parameters, range(2, 4))
    last = guarded.AdamW(parameters, lr=0.0, master=master)
    last.load_state_dict(middle.state_dict())
    last.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in parameters]
    train(last, parameters, range(4, 5))
    assert all(map(torch.equal, before, parameters))  # a stale master would change them


@pytest.mark.parametrize(
    ("saved", "now"), [("remainder", None), ("float32", "remainder"), (None, "float32")]
)
def test_another_master_mode_raises_and_changes_nothing(saved, now):
    parameters, others = run(torch.bfloat16), run(torch.bfloat16)
    first = guarded.AdamW(others, master=saved)
    train(first, others, range(2))
    optimizer = guarded.AdamW(parameters, lr=0.5, master=now)
    train(optimizer, parameters, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"master={saved!r}.*construct the optimizer with"):
        optimizer.load_state_dict(first.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entries in before["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, after["state"][i][key])


def test_invalid_settings_raise_and_change_nothing():
    parameters = run()
    optimizer = guarded.AdamW(parameters)
    train(optimizer, parameters, range(1))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["lr"] = -1.0
    state = optimizer.state[parameters[0]]
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        optimizer.load_state_dict(bad)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.state[parameters[0]] is state
    train(optimizer, parameters, range(1))


@pytest.mark.parametrize("kind", KINDS)
def test_each_param_group_gets_its_own_state(kind):
    options = {"momentum": 0.9} if kind is guarded.SGD else {}

    def of_groups(seed):
        torch.manual_seed(seed)
        shapes = ((3,), (2, 5), (4,), (6,), (7,))
        a, *others = (torch.nn.Parameter(torch.randn(s)) for s in shapes)
        groups = [{"params": [a]}, {"params": others[:2]}, {"params": others[2:]}]
        return [a, *others], kind(groups, **options)

    parameters, optimizer = of_groups(0)
    train(optimizer, parameters, range(3))
    others, again = of_groups(0)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(parameters, others, strict=True):
        assert optimizer.state[p].keys() == again.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(again.state[q][key], value)


@pytest.mark.parametrize("entry", ["exp_avg", "step"])
def test_state_of_another_shape_raises_and_changes_nothing(entry):
    parameters = run()
    optimizer = guarded.AdamW(parameters)
    train(optimizer, parameters, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][1][entry] = torch.zeros(2)
    with pytest.raises(ValueError, match=f"{entry!r} of shape .2,. .* in the same order"):
        optimizer.load_state_dict(wrong)
    train(optimizer, parameters, range(2, 4))
    for key, value in before["state"][1].items():
        assert value.shape == optimizer.state[parameters[1]][key].shape


def test_a_deep_copy_trains_independently():
    parameters = run(torch.bfloat16)
    optimizer = guarded.AdamW(parameters, master="remainder")
    train(optimizer, parameters, range(2))
    twin = copy.deepcopy(optimizer)
    theirs = twin.param_groups[0]["params"]
    train(optimizer, parameters, range(2, 4))
    train(twin, theirs, range(2, 4))
    assert all(map(torch.equal, parameters, theirs))
