"""The guard works with `get_optimizer_state_dict` and `set_optimizer_state_dict` of torch."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastguard.optim
from fastguard import GuardedOptimizer, SpikeRule
from fastguard.guard.state_dict.torch_dcp import split
from guardtest.training import assert_same_bits, snapshot

NAN = float("nan")
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*")
        warnings.filterwarnings("ignore", message="TypedStorage")  # torch 2.8 warns about itself
        yield


SPIKES = {"loss": SpikeRule(window=4, warmup=2)}
SETTINGS = {"SGD": {"momentum": 0.9}, "AdamW": {"fused": True}}


def build(
    kind: str = "AdamW", settings: dict[str, Any] | None = None, **options: Any
) -> tuple[torch.nn.Module, GuardedOptimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = [{"params": list(layer.parameters())} for layer in model]
    settings = SETTINGS[kind] if settings is None else settings
    inner = getattr(torch.optim, kind)(groups, lr=0.1, **settings)
    return model, GuardedOptimizer(inner, **(options or {"spike": SPIKES}))


def train(model: torch.nn.Module, opt: GuardedOptimizer, steps: range) -> None:
    for i in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(i))
        loss = model(x).square().mean() * (NAN if i == 2 else 1.0)
        opt.zero_grad()
        loss.backward()
        opt.step(loss=loss)
    opt.zero_grad()


@pytest.mark.parametrize("options", [None, FLAT, WHOLE], ids=["plain", "flat", "full"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_run_resumes_exactly_including_the_guard(
    tmp_path: Path, options: StateDictOptions | None, kind: str
) -> None:
    model, opt = build(kind)
    train(model, opt, range(5))
    saved = {
        "model": model.state_dict(),
        "optim": get_optimizer_state_dict(model, opt, options=options),
    }
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    train(model, opt, range(5, 9))

    other, fresh = build(kind)
    template = {
        "model": other.state_dict(),
        "optim": get_optimizer_state_dict(other, fresh, options=options),
    }
    assert fresh.steps_taken == fresh.applied_steps == 0  # the step that torch takes is not counted
    assert fresh.records() == []
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(template["model"])
    set_optimizer_state_dict(other, fresh, template["optim"], options=options)
    assert (fresh.steps_taken, fresh.applied_steps, fresh.skipped_steps) == (5, 4, 1)
    train(other, fresh, range(5, 9))
    assert_same_bits(snapshot(fresh), snapshot(opt))
    guards = [o.state_dict()["fastguard"] for o in (fresh, opt)]
    for name in ("counters", "windows", "rings"):
        assert torch.equal(guards[0][name], guards[1][name])


def test_the_entry_in_the_param_groups_does_not_appear_in_other_state_dicts() -> None:
    model, opt = build()
    train(model, opt, range(2))
    before = opt.state_dict()["param_groups"]
    get_optimizer_state_dict(model, opt)
    assert opt.state_dict()["param_groups"] == before
    assert all("fastguard" not in group for group in before)


def test_an_ordinary_step_with_lr_zero_and_no_gradients_counts() -> None:
    model, opt = build()
    for group in opt.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.applied_steps == 1


def test_a_step_with_a_shallow_stack_is_not_taken_for_a_call_of_torch() -> None:
    model, opt = build()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    thread = threading.Thread(target=opt.step)  # as in a trainer that steps in the background
    thread.start()
    thread.join()
    assert opt.applied_steps == 1


def test_splitting_does_not_change_the_argument() -> None:
    guard = {"version": 1}
    given = {"state": {}, "param_groups": [{"lr": 0.1, "fastguard": guard}, {"lr": 0.2}]}
    inner = {"state": {}, "param_groups": [{"lr": 0.1}, {"lr": 0.2}]}
    before = copy.deepcopy(given)
    assert split(given) == (inner, guard)
    assert given == before
    assert split({**inner, "fastguard": guard}) == (inner, guard)
    assert split(inner) == (inner, None)


def test_the_state_of_an_unguarded_optimizer_loads_into_a_new_guard() -> None:
    model, opt = build()
    train(model, opt, range(3))
    saved = get_optimizer_state_dict(model, opt.optimizer)
    other, fresh = build()
    with pytest.warns(UserWarning, match="the guard starts with counters at 0"):
        set_optimizer_state_dict(other, fresh, saved)
    assert fresh.steps_taken == 0
    assert fresh.state[other[0].weight]["step"].item() == 2


@pytest.mark.parametrize("spike", [None, SPIKES], ids=["default", "spikes"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("cpu_offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize(
    "form", [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}]
)
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}], ids=["stateless", "momentum"])
def test_a_guard_loads_every_form_of_state_dict(
    form: dict[str, bool],
    cpu_offload: bool,
    trained: bool,
    settings: dict[str, float],
    spike: dict[str, SpikeRule] | None,
) -> None:
    """This includes a guard that never saved. torch cannot load a full, flattened state dict."""
    options = StateDictOptions(**form, cpu_offload=cpu_offload)
    model, opt = build("SGD", settings, spike=spike)
    train(model, opt, range(5))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    other, fresh = build("SGD", settings, spike=spike)
    if trained:
        train(other, fresh, range(1))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert (fresh.steps_taken, fresh.applied_steps, fresh.skipped_steps) == (5, 4, 1)
    for o, m in ((opt, model), (fresh, other)):
        assert all("fastguard" not in group for group in o.param_groups)
        train(m, o, range(5, 7))
    assert_same_bits(snapshot(fresh), snapshot(opt))


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_the_flattened_state_of_an_unguarded_optimizer_loads_into_a_new_guard(
    trained: bool,
) -> None:
    model, opt = build()
    train(model, opt, range(3))
    saved = get_optimizer_state_dict(model, opt.optimizer, options=FLAT)
    other, fresh = build()
    if trained:
        train(other, fresh, range(2))
    get_optimizer_state_dict(other, fresh, options=FLAT)
    with pytest.warns(UserWarning, match="the guard starts with counters at 0"):
        set_optimizer_state_dict(other, fresh, saved, options=FLAT)
    assert fresh.steps_taken == 0
    assert fresh.state[other[0].weight]["step"].item() == 2


def test_no_container_in_a_state_dict_is_empty() -> None:
    """torch.distributed.checkpoint drops empty containers."""

    def containers(value: Any) -> Iterator[Any]:
        if isinstance(value, dict | list | tuple):
            yield value
            for item in value.values() if isinstance(value, dict) else value:
                yield from containers(item)

    _, opt = build(max_norm=1.0)
    assert all(containers(opt.state_dict()["fastguard"]))


def test_a_state_dict_without_state_is_refused_by_an_optimizer_with_state() -> None:
    model, opt = build()
    train(model, opt, range(2))
    saved = get_optimizer_state_dict(model, opt)
    before = snapshot(opt)
    del saved["state"]
    with pytest.raises((KeyError, ValueError)):
        set_optimizer_state_dict(model, opt, saved)
    with pytest.raises(ValueError, match="lacks 'state'"):
        opt.load_state_dict(saved)
    assert_same_bits(snapshot(opt), before)


@pytest.mark.parametrize(
    "options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}]
)
@pytest.mark.parametrize("kept", [True, "trusted"])
@pytest.mark.parametrize("flat", ["flat_buckets", "flat_parameters", "own"])
def test_a_guard_with_flat_gradients_gets_its_state_before_the_first_step(
    flat: str, kept: bool | str, options: dict[str, bool]
) -> None:
    """Flat gradients always exist, and torch creates state only if there are no gradients."""

    def made() -> tuple[torch.nn.Module, GuardedOptimizer]:
        if flat != "own":
            return build(**{flat: kept})
        model, _ = build()
        groups = [{"params": list(layer.parameters())} for layer in model]
        inner = fastguard.optim.AdamW(groups, lr=0.1)
        return model, GuardedOptimizer(inner, flat_buckets=kept)

    form = StateDictOptions(**options)
    model, opt = made()
    train(model, opt, range(4))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=form))
    other, fresh = made()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, saved, options=form)
    for each in ((model, opt), (other, fresh)):
        train(*each, range(4, 7))
    assert_same_bits(snapshot(fresh), snapshot(opt))


def test_flat_gradients_that_are_not_zero_stay() -> None:
    model, opt = build(flat_buckets=True)
    model(torch.ones(5, 3)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    get_optimizer_state_dict(model, opt)
    assert all(map(torch.equal, [p.grad for p in model.parameters()], before))
