"""State dicts are exchangeable between flat parameters and torch's optimizers."""

import copy

import pytest
import torch
from torch import nn

from fastguard import CheckpointStore, GuardedOptimizer, Rollback
from guardtest.flat_pairs import CLOSE, KINDS, in_one_buffer, pair_of
from guardtest.grads import assert_bitwise_equal
from guardtest.training import assert_same_bits, snapshot


def in_slots(pair):
    return in_one_buffer(pair.ours) and all(
        in_one_buffer([s[k] for s in pair.opt.state.values() if k in s])
        for k in ("step", "exp_avg", "exp_avg_sq")
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:the state dict has no 'fastguard'")
def test_flat_and_plain_guards_load_the_state_of_each_other(kind):
    """Training continues equally after each guard has loaded the state dict of the other."""
    pair = pair_of(kind)
    for number in range(3):
        pair.step(number)
    ours, theirs = pair.opt.state_dict(), pair.plain.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert {i: list(s) for i, s in ours["state"].items()} == {
        i: list(s) for i, s in theirs["state"].items()
    }
    ours, theirs = copy.deepcopy((ours, theirs))
    ours.pop("fastguard")
    pair.plain.load_state_dict(ours)
    pair.opt.load_state_dict(theirs)
    for number in range(3, 6):
        pair.step(number)
        pair.assert_same()


@pytest.mark.parametrize("through", ["wrapper", "wrapped"])
def test_a_loaded_state_moves_into_the_buffers_and_is_not_shared(through):
    pair = pair_of("adamw")
    pair.step(0)
    saved = pair.plain.state_dict()
    before = copy.deepcopy(saved)
    target = pair.opt if through == "wrapper" else pair.opt.optimizer
    saved["fastguard"] = pair.opt.state_dict()["fastguard"]
    target.load_state_dict(saved)
    saved.pop("fastguard")
    pair.step(1)
    assert in_slots(pair)
    pair.assert_same()
    for p in pair.ours:
        p.grad = torch.ones_like(p)
    now = copy.deepcopy(pair.plain.state_dict())
    pair.opt.step()  # must not change the optimizer that saved it
    for i, state in pair.plain.state_dict()["state"].items():
        for key, value in state.items():
            assert_bitwise_equal(value, now["state"][i][key])
    assert before["state"][0]["step"] == 1.0


def test_step_counts_per_tensor_are_preserved():
    pair = pair_of("adamw")
    for number, without in enumerate([(1, 2), (), (0,), ()]):
        pair.step(number, without)
    counts = [float(pair.opt.state[p]["step"]) for p in pair.ours]
    assert counts == [3.0, 3.0, 3.0, 4.0, 4.0, 4.0, 4.0]
    loaded = copy.deepcopy(pair.opt.state_dict())
    pair.opt.load_state_dict(loaded)
    pair.step(4)
    pair.assert_same()


def test_an_emptied_state_is_created_again():
    pair = pair_of("adamw")
    for number in range(3):
        pair.step(number)
    for opt in (pair.opt.optimizer, pair.plain):
        opt.state.clear()
    pair.step(3)
    pair.assert_same()
    assert float(pair.opt.state[pair.ours[0]]["step"]) == 1.0


def test_a_state_restored_in_place_is_detected():
    pair = pair_of("adamw")
    pair.step(0)
    kept = {p: {k: v.clone() for k, v in s.items()} for p, s in pair.opt.state.items()}
    theirs = copy.deepcopy(pair.plain.state_dict())
    pair.step(1)
    for ours, q in zip(pair.ours, pair.theirs, strict=True):
        with torch.no_grad():
            q.copy_(ours)
    pair.plain.load_state_dict(theirs)
    pair.opt.state.clear()
    pair.opt.state.update(kept)
    pair.step(2)
    pair.assert_same()
    assert in_slots(pair)


def model_and_guard(flat=True, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 2))
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    return model, GuardedOptimizer(inner, max_norm=1.0, flat_parameters=flat)


def train(model, opt, numbers, bad=()):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        opt.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().mean().backward()
        if number in bad:
            next(model.parameters()).grad[0, 0] = float("nan")
        opt.step()


def assert_close_models(a, b):
    for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


def test_the_state_dict_of_a_model_loads_in_place():
    (a, opt), (b, plain) = model_and_guard(), model_and_guard(flat=False)
    other, _ = model_and_guard(seed=7)
    for model, guard in ((a, opt), (b, plain)):
        train(model, guard, range(3))
        model.load_state_dict(other.state_dict())
        train(model, guard, range(3, 5))
    assert_close_models(a, b)
    assert in_one_buffer(list(a.parameters()))


def test_a_rollback_restores_weights_and_state_bit_for_bit():
    model, opt = model_and_guard()
    rollback = Rollback(opt, {"model": model}, every=2, after_skips=1)
    for number in range(4):
        train(model, opt, [number])
        rollback.step()
    expected = snapshot(opt.optimizer)
    train(model, opt, [4], bad=[4])
    assert rollback.step() is not None
    assert_same_bits(snapshot(opt.optimizer), expected)
    twin, plain = model_and_guard(flat=False)
    train(twin, plain, range(4))
    train(model, opt, range(5, 7))
    train(twin, plain, range(5, 7))
    assert_close_models(model, twin)
    assert in_one_buffer(list(model.parameters()))


@pytest.mark.parametrize(("saves", "loads"), [(True, False), (False, True), (True, True)])
def test_checkpoints_resume_with_and_without_flat_parameters(tmp_path, saves, loads):
    model, opt = model_and_guard(flat=saves)
    train(model, opt, range(3))
    with CheckpointStore(tmp_path) as store:
        assert store.save(model=model, optimizer=opt, step=3).clean
    other, resumed = model_and_guard(flat=loads, seed=5)
    with CheckpointStore(tmp_path) as store:
        store.load(model=other, optimizer=resumed)
    assert_same_bits(snapshot(resumed.optimizer), snapshot(opt.optimizer))
    for pair in ((model, opt), (other, resumed)):
        train(*pair, range(3, 6))
    assert_close_models(model, other)


def test_saving_a_model_writes_its_weights_once(tmp_path):
    model, opt = model_and_guard()
    train(model, opt, range(2))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    for key, value in model.state_dict().items():
        assert_bitwise_equal(loaded[key], value)
    assert (tmp_path / "model.pt").stat().st_size < 8000
