"""`Rollback` in a loop that loads states manually, at any point."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from fastguard import GuardedLR, GuardedOptimizer, Rollback, TrainingDivergedError
from guardtest import longrun
from guardtest.rollback_run import Run, same


@pytest.fixture(params=[False, True], ids=["at once", "delayed"])
def delayed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the record of step k arrives only before step k + 1, as on a GPU."""
    if request.param:
        longrun.delay_records(monkeypatch)
    return request.param


class Loop:
    """A loop in which a state can be loaded at any point."""

    def __init__(self, **rollback) -> None:
        self.model = torch.nn.Linear(2, 1)
        self.opt = GuardedOptimizer(torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True))
        self.lr = GuardedLR(self.opt, backoff=0.5, recovery=3)
        self.rollback = Rollback(self.opt, {"model": self.model}, lr=self.lr, **rollback)

    def step(self, scale: float = 1.0) -> None:
        self.opt.zero_grad()
        (self.model(torch.ones(3, 2)).square().mean() * scale).backward()
        self.opt.step()
        self.lr.step()


@pytest.mark.parametrize("n_before", [1, 2, 5])
@pytest.mark.usefixtures("delayed")
def test_a_state_loaded_between_a_step_and_its_rollback_step(n_before: int) -> None:
    run = Loop(every=100, after_skips=2)
    start = copy.deepcopy(run.opt.state_dict())
    for i in range(n_before):
        run.step(math.nan if i == n_before - 1 else 1.0)
        if i < n_before - 1:
            assert run.rollback.step(i) is None
    run.opt.load_state_dict(start)
    assert run.rollback.step("loaded") is None
    run.step(math.nan)
    # Not the second consecutive skip, because of the load.
    assert run.rollback.step("bad 1") is None
    rewind = None
    for i in (2, 3, 4):
        run.step(math.nan)
        rewind = rewind or run.rollback.step(f"bad {i}")
    assert rewind is not None and rewind.skip[:2] == ("bad 1", "bad 2")


@pytest.mark.usefixtures("delayed")
def test_loading_a_state_of_later_steps_works_too() -> None:
    ahead = Loop(every=100)
    for _ in range(9):
        ahead.step()
    run = Loop(every=100, after_skips=2)
    run.step()
    run.opt.load_state_dict(ahead.opt.state_dict())
    rewind, given = None, iter(range(10))
    while rewind is None:
        run.step(math.nan)
        rewind = run.rollback.step(next(given))
    assert rewind.skip == (0, 1)


def test_the_first_good_step_after_a_load_is_saved() -> None:
    """Otherwise a run resumed late would return to its initial weights."""
    saved = Run(every=100)
    for i in range(7):
        saved.batch(i)
    model, optimizer = (copy.deepcopy(x.state_dict()) for x in (saved.model, saved.opt))
    run = Run(every=100, after_skips=1)
    run.model.load_state_dict(model)
    run.opt.load_state_dict(optimizer)
    run.batch(7)
    kept = run.state()
    assert run.rollback.snapshots == [0, 8]
    run.batch(8)
    assert run.batch(9, math.nan).step == 8
    assert same(run.state(), kept)


def test_a_bad_step_after_a_load_is_not_saved() -> None:
    run = Run(every=100, after_skips=3)
    run.batch(0)
    run.opt.load_state_dict(run.opt.state_dict())
    run.batch(1, math.nan)
    assert run.rollback.snapshots == [0]
    run.batch(2)
    assert run.rollback.snapshots == [0, 3]


def test_loading_a_state_resets_the_count_of_spikes() -> None:
    run = Run(every=100, after_skips=None, after_spikes=2)
    for i in range(6):
        run.batch(i)
    run.batch(6, 1e6)
    run.opt.load_state_dict(run.opt.state_dict())
    assert run.batch(7, 1e12) is None
    assert run.batch(8, 1e24) is not None


def test_a_load_between_bad_steps_and_their_rollback_discards_them() -> None:
    """The batches remain bad after a load."""
    run = Run(every=100, after_skips=5)
    for i in range(3):
        run.batch(i)
    older = copy.deepcopy(run.opt.state_dict())
    run.batch(3, math.nan)
    run.opt.load_state_dict(older)
    run.batch(4, math.nan)
    assert run.rollback.trigger().skip == (3, 4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("delayed")
def test_any_order_of_steps_loads_and_rollbacks(seed: int) -> None:
    choose = random.Random(seed)
    run = Loop(
        every=choose.choice([1, 2, 5]), after_skips=choose.choice([1, 2, 3]), max_attempts=99
    )
    saved = [copy.deepcopy((run.model.state_dict(), run.opt.state_dict(), run.lr.state_dict()))]
    bad, is_untold = set(), False  # positions of bad steps
    for i in range(80):
        act = choose.choice(["step"] * 6 + ["save", "model", "opt", "lr", "all", "observe", "back"])
        state = choose.choice(saved)
        if act == "save":
            now = run.model.state_dict(), run.opt.state_dict(), run.lr.state_dict()
            saved.append(copy.deepcopy(now))
        if act in ("model", "all"):
            run.model.load_state_dict(state[0])
        if act in ("opt", "all"):
            run.opt.load_state_dict(state[1])
        if act in ("lr", "all"):
            run.lr.load_state_dict(copy.deepcopy(state[2]))
        if act == "observe":
            run.opt.observe(torch.tensor(math.nan))
        if act == "back":
            assert set(run.rollback.trigger().skip) <= bad
            is_untold = False
            continue
        if act == "step" or choose.random() < 0.5:
            is_bad = choose.random() < 0.4 or bool(run.opt._observed._batches)
            run.step(math.nan if is_bad else 1.0)
            is_untold = is_untold or is_bad
        if choose.random() < 0.8:
            bad |= {i} if is_untold else set()
            is_untold = False
            rewind = run.rollback.step(i)
            assert rewind is None or rewind.skip
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert run.rollback.rollbacks > 0


def test_rollback_still_gives_up_after_loads() -> None:
    run = Run(every=2, after_skips=1, max_attempts=1)
    run.batch(0, math.nan)
    run.opt.load_state_dict(run.opt.state_dict())
    with pytest.raises(TrainingDivergedError, match="1 rollback did not solve the problem"):
        run.batch(1, math.nan)


def test_after_a_param_group_was_added_the_next_good_step_is_saved() -> None:
    run = Loop(every=100, after_skips=2)
    late = torch.nn.Parameter(torch.ones(1))
    run.step()
    run.rollback.step(0)
    run.opt.add_param_group({"params": [late], "lr": 0.01})
    run.step()
    run.rollback.step(1)
    assert run.rollback.snapshots == [0, 2]
    for i in (2, 3):
        run.step(math.nan)
        rewind = run.rollback.step(i)
    assert rewind is not None and (rewind.step, rewind.skip) == (2, (2, 3))


def test_a_state_with_other_param_groups_is_not_loaded_partly() -> None:
    run = Loop(every=100, after_skips=1)
    run.step()
    run.rollback.step(0)
    before = run.model.weight.clone()
    run.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    run.step(math.nan)
    with pytest.raises(TrainingDivergedError, match=r"can be restored.*with other param groups"):
        run.rollback.step(1)
    assert torch.equal(run.model.weight, before)
