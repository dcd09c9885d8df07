"""Every optimizer of the popular packages, compared with and without a guard."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastguard import GuardedOptimizer, Rollback
from guardtest.third_party import (
    LEFT_OUT,
    MAKERS,
    NEED_GRAPH,
    REFUSED,
    Maker,
    Model,
    Run,
    adamw,
    driven,
    maker_of,
    optimizers,
    same,
    values,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the packages

CANNOT_SAVE = {"torch_optimizer.Lookahead"}  # it never calls Optimizer.__init__
DRIVEN = driven()


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Disables compilation, which takes seconds per optimizer."""
    with torch.compiler.set_stance("force_eager"):
        yield


def resumed(name: str, how: Maker, guarded: bool) -> tuple[list[Tensor], Any]:
    """Returns weights and state after three steps, a save, a load into a new run, and two steps."""
    first, second = Run(name, guarded, how), Run(name, guarded, how)
    first.step(0, 1, 2)
    file = io.BytesIO()
    torch.save([first.opt.state_dict(), first.model.state_dict()], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=False)
    second.model.load_state_dict(weights)
    second.opt.load_state_dict(state)
    second.step(3, 4)
    return second.weights(), second.state()


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", DRIVEN)
def test_a_guarded_optimizer_matches_the_bare_one(name: str) -> None:
    how = maker_of(name)
    bare, guard = Run(name, False, how), Run(name, True, how)
    bare.step(0, 1, 2)
    guard.step(0, 1, 2)
    assert same(guard.weights(), bare.weights())

    before = guard.weights(), outcome(guard.state)
    guard.step(99, bad=True)
    assert guard.opt.skipped_steps == 1
    assert same(guard.weights(), before[0]) and outcome(guard.state) == before[1]
    bare.step(3, 4)
    guard.step(3, 4)
    assert same(guard.weights(), bare.weights())
    if name in CANNOT_SAVE:
        assert before[1] is AttributeError
        with pytest.raises(ValueError, match="cannot be saved"):
            Rollback(guard.opt, {"model": guard.model})
        return

    theirs = outcome(lambda: resumed(name, how, guarded=False))
    ours = outcome(lambda: resumed(name, how, guarded=True))
    assert isinstance(theirs, tuple), f"the bare optimizer does not resume: {theirs}"
    assert isinstance(ours, tuple), f"the guarded optimizer does not resume: {ours}"
    assert same(ours[0], theirs[0]) and ours[1] == theirs[1]


@pytest.mark.parametrize("name", sorted(set(DRIVEN) - CANNOT_SAVE))
def test_a_rollback_restores_the_state(name: str) -> None:
    run = Run(name, True, maker_of(name))
    rollback = Rollback(run.opt, {"model": run.model}, every=2, after_skips=1)
    for step in range(2):
        run.step(step)
        rollback.step(step)
    before = run.weights(), run.state()
    run.step(2)
    rollback.step(2)
    run.step(99, bad=True)
    rewind = rollback.step(3)
    assert rewind is not None and rewind.step == 2
    assert same(run.weights(), before[0]) and run.state() == before[1]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unsupported_optimizers_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(TypeError, match=REFUSED[name]):
        GuardedOptimizer(optimizers()[name](adamw(Model())))


def test_the_lists_name_existing_optimizers() -> None:
    named = {*LEFT_OUT, *REFUSED, *CANNOT_SAVE, *NEED_GRAPH}
    assert named <= set(optimizers())
    assert len(DRIVEN) > 180


@pytest.mark.parametrize("name", ["schedulefree.AdamWScheduleFree", "timm.optim.Lookahead"])
def test_attributes_that_training_loops_probe_exist(name: str) -> None:
    run = Run(name, True, maker_of(name))
    run.step(0, 1)
    inner = run.inner
    if name.startswith("schedulefree"):
        trained = run.weights()
        run.opt.eval()
        assert not inner.param_groups[0]["train_mode"] and not same(run.weights(), trained)
        run.opt.train()
        assert inner.param_groups[0]["train_mode"]
    else:
        run.opt.sync_lookahead()
        assert run.opt.is_second_order is False
    assert not hasattr(run.opt, "sync_lookahead" if hasattr(inner, "eval") else "eval")


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_quantised_state_is_copied_with_the_guard(name: str) -> None:
    """A copied torchao optimizer loses attributes and cannot step, but its state is complete."""
    run = Run(f"torchao.optim.{name}", True, MAKERS[0])
    run.step(0, 1)
    before = run.state()
    twin = copy.deepcopy(run.opt)
    assert values(twin.optimizer.state_dict()) == before
    run.step(2)
    assert values(twin.optimizer.state_dict()) == before != run.state()
