"""`GuardedOptimizer.lifetime`: the counts of a run, independent of loaded states."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from fastguard import CheckpointStore, GuardedOptimizer, Rollback
from fastguard.guard.lifetime import Lifetime

GOOD, BAD = 1.0, math.nan


def guarded() -> GuardedOptimizer:
    p = torch.nn.Parameter(torch.zeros(2))
    return GuardedOptimizer(torch.optim.AdamW([p], fused=True))


def play(opt: GuardedOptimizer, losses: list[float]) -> GuardedOptimizer:
    for loss in losses:
        opt.param_groups[0]["params"][0].grad = torch.ones(2)
        opt.step(loss=loss)
    return opt


def test_without_a_load_they_equal_the_counters_of_the_state() -> None:
    opt = play(guarded(), [GOOD, BAD, GOOD])
    assert opt.lifetime == Lifetime(steps=3, applied=2, skipped=1, loss_scale_skips=0)
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)


@pytest.mark.parametrize("on_disk", [False, True])
def test_rollbacks_do_not_lower_them(on_disk: bool, tmp_path) -> None:
    opt = guarded()
    store = CheckpointStore(tmp_path) if on_disk else None
    rollback = Rollback(opt, {}, every=2, after_skips=2, max_attempts=99, store=store)
    for _ in range(14):
        for loss in (GOOD, GOOD, GOOD, BAD, BAD):
            play(opt, [loss])
            rollback.step()
    assert rollback.rollbacks == 14
    assert opt.skipped_steps == 0
    assert opt.lifetime == Lifetime(70, 42, 28)
    assert opt.lifetime.applied - opt.applied_steps == 14  # each round lost its third good step
    play(opt, [BAD])
    assert opt.lifetime.skipped == 29


def test_a_resumed_process_continues_the_counts() -> None:
    opt = play(guarded(), [GOOD, GOOD])
    state = opt.state_dict()
    play(opt, [BAD, BAD])
    opt.load_state_dict(state)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = guarded()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.lifetime == opt.lifetime == Lifetime(4, 2, 2)
    assert other.skipped_steps == 0
    assert play(other, [BAD]).lifetime == Lifetime(5, 2, 3)


def test_a_resume_from_an_earlier_checkpoint_has_the_counts_of_that_time() -> None:
    opt = play(guarded(), [GOOD, BAD])
    early = copy.deepcopy(opt.state_dict())
    play(opt, [BAD] * 3)
    fresh = guarded()
    fresh.load_state_dict(early)
    assert fresh.lifetime == Lifetime(2, 1, 1)
    opt.load_state_dict(early)  # this process has taken more steps
    assert opt.lifetime == Lifetime(5, 1, 4)


def test_loading_repeatedly_in_any_order_counts_nothing_twice() -> None:
    opt = guarded()
    states = [copy.deepcopy(play(opt, [GOOD, BAD]).state_dict()) for _ in range(3)]
    for state in (states[0], states[0], states[2], states[1], opt.state_dict()):
        opt.load_state_dict(copy.deepcopy(state))
        assert opt.lifetime == Lifetime(6, 3, 3)
    assert opt.applied_steps == 3


def test_the_counts_of_a_longer_loaded_run_replace_the_current_ones() -> None:
    longer = play(guarded(), [GOOD] * 9 + [BAD])
    opt = play(guarded(), [BAD] * 3)
    opt.load_state_dict(longer.state_dict())
    assert opt.lifetime == Lifetime(10, 9, 1)


@pytest.mark.filterwarnings("ignore:the state dict has no 'fastguard' entry")
def test_states_without_counts_do_not_lower_them() -> None:
    opt = play(guarded(), [BAD, GOOD])
    opt.load_state_dict(opt.optimizer.state_dict())
    assert (opt.skipped_steps, opt.lifetime.skipped) == (0, 1)
    older = play(guarded(), [GOOD] * 5).state_dict()
    del older["fastguard"]["taken_back"]
    opt.load_state_dict(older)
    assert opt.lifetime == Lifetime(5, 5, 0)


@pytest.mark.parametrize("damaged", ["3", torch.zeros(3), torch.tensor([1, 0, -1, 0])], ids=str)
def test_damaged_counts_are_refused_and_change_nothing(damaged) -> None:
    opt = play(guarded(), [GOOD, BAD])
    state = opt.state_dict()
    state["fastguard"]["taken_back"] = damaged
    with pytest.raises(ValueError, match="taken_back"):
        opt.load_state_dict(state)
    assert opt.lifetime == Lifetime(2, 1, 1)


def test_copies_have_the_same_lifetime() -> None:
    opt = play(guarded(), [GOOD])
    state = opt.state_dict()
    play(opt, [BAD])
    opt.load_state_dict(state)
    assert copy.deepcopy(opt).lifetime == Lifetime(2, 1, 1)


def test_a_checkpoint_after_a_rollback_includes_its_skips(tmp_path) -> None:
    opt = guarded()
    store = CheckpointStore(tmp_path)
    store.save(optimizer=opt, step=0)
    play(opt, [BAD] * 3)
    store.load("last-clean", optimizer=opt)
    entry = store.save(optimizer=play(opt, [GOOD]), step=1)
    assert entry is not None and (entry.incidents, entry.skipped_steps) == (3, 3)
