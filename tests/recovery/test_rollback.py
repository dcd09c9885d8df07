"""`Rollback` restores the last good state within the process."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fastguard import (
    GuardedLR,
    GuardedOptimizer,
    Rollback,
)
from fastguard.recovery.snapshot import Snapshot
from guardtest.rollback_run import Run, same


def test_one_call_can_cover_several_steps() -> None:
    run = Run(every=3, after_skips=2)
    rewinds = []
    for i in range(4):
        run.opt.zero_grad()
        for p in run.model.parameters():
            p.grad = torch.full_like(p, math.nan if i >= 2 else 0.1)
        run.opt.step()
        if i % 2:
            rewinds.append(run.rollback.step(position=f"pair {i // 2}"))
    assert rewinds[0] is None
    assert (rewinds[1].step, rewinds[1].skip) == (0, ("pair 1", "pair 1"))


def test_after_a_load_only_later_positions_count() -> None:
    run = Run(every=100, after_skips=2)
    for i in range(4):
        run.batch(i)
    older = copy.deepcopy(run.opt.state_dict())
    for i in range(4, 10):
        run.batch(i)
    run.opt.load_state_dict(older)
    assert run.batch(104, math.nan) is None
    rewind = run.batch(105, math.nan)
    assert rewind is not None and rewind.skip == (104, 105)


def test_a_problem_before_the_first_snapshot_restores_the_initial_data_position() -> None:
    run = Run(every=5, after_skips=1, position=40)
    run.batch(41)
    rewind = run.batch(42, math.nan)
    assert rewind is not None
    assert (rewind.step, rewind.position, rewind.skip) == (0, 40, (42,))
    assert rewind.reason == "a step was skipped"


def test_too_many_skips_restore_the_last_snapshot_bit_for_bit() -> None:
    run = Run(every=5, after_skips=3, lr_factor=0.5)
    for i in range(7):
        assert run.batch(i) is None
    assert run.rollback.snapshots == [0, 5]
    at_five = None
    fresh = Run(every=5)
    for i in range(5):
        fresh.batch(i)
    at_five = fresh.state()

    assert run.batch(7, math.nan) is None
    assert run.batch(8, math.nan) is None
    rewind = run.batch(9, math.nan)
    assert rewind is not None
    assert (rewind.step, rewind.position, rewind.skip) == (5, 4, (7, 8, 9))
    assert rewind.attempt == 1 and "3 steps in a row were skipped" in rewind.reason
    assert same(run.state(), at_five)
    assert run.opt.param_groups[0]["lr"] == pytest.approx(0.005)
    assert run.opt.skipped_steps == 0  # the state of the guard was restored too


def test_the_run_after_a_rollback_equals_one_without_the_bad_batches() -> None:
    run = Run(every=2, after_skips=2, lr_factor=1.0)
    for i in range(4):
        run.batch(i)
    run.batch(4, math.nan)
    rewind = run.batch(5, math.nan)
    for i in range(rewind.position + 1, 9):
        if i not in rewind.skip:
            run.batch(i)
    clean = Run(every=2, lr_factor=1.0)
    for i in (0, 1, 2, 3, 6, 7, 8):
        clean.batch(i)
    assert same(run.state(), clean.state())


def test_persistent_spikes_trigger_a_rollback() -> None:
    run = Run(every=5, after_skips=None, after_spikes=2)
    for i in range(6):
        assert run.batch(i) is None
    assert run.batch(6, 1e6) is None
    rewind = run.batch(7, 1e12)
    assert rewind is not None and rewind.skip == (6, 7)
    assert rewind.reason.endswith("had a spike")


def test_spikes_are_counted_from_zero_after_a_rollback() -> None:
    run = Run(every=5, after_skips=None, after_spikes=2)
    for i in range(6):
        run.batch(i)
    run.batch(6, 1e6)
    assert run.batch(7, 1e12) is not None
    assert run.batch(8, 1e6) is None
    assert run.batch(9, 1e12) is not None


def test_one_spike_can_trigger_a_rollback() -> None:
    run = Run(every=5, after_skips=None, after_spikes=1)
    for i in range(6):
        run.batch(i)
    assert run.batch(6, 1e6).reason == "a step spiked"


def test_only_bad_steps_after_the_snapshot_are_skipped() -> None:
    run = Run(every=2, after_skips=5)
    for i, scale in enumerate((1.0, 1.0, math.nan, 1.0, 1.0)):
        run.batch(i, scale)
    assert run.rollback.snapshots == [2, 5]
    assert run.rollback.trigger().skip == ()
    run.batch(5, math.nan)
    run.rollback.snapshot()  # after the step that was bad
    run.batch(6, math.nan)
    assert run.rollback.trigger().skip == (6,)


def test_bad_steps_before_a_poisoned_snapshot_are_skipped_too() -> None:
    run = Run(every=2, after_skips=5)
    for i in range(2):
        run.batch(i)
    run.batch(2, math.nan)
    with torch.no_grad():
        run.model[0].weight[0, 0] = math.nan
    run.rollback.snapshot()
    assert run.rollback.snapshots == [2, 3]
    rewind = run.rollback.trigger()
    assert (rewind.step, rewind.skip) == (2, (2,))


def test_the_caller_can_trigger_a_rollback_before_calling_step() -> None:
    """The record of the step is used with its position, or not at all."""
    run = Run(every=2, after_skips=2)
    for i in range(2):
        run.batch(i)
    run.opt.step(loss=math.nan)
    assert run.rollback.trigger().step == 2
    assert run.batch(3) is None
    run.batch(4, math.nan)
    assert run.batch(5, math.nan).skip == (4, 5)


def test_the_caller_can_trigger_a_rollback() -> None:
    run = Run(every=2)
    for i in range(3):
        run.batch(i)
    assert run.rollback.trigger("validation collapsed").step == 2


def test_only_consecutive_spikes_trigger_a_rollback() -> None:
    run = Run(every=100, after_skips=None, after_spikes=2)
    for i in range(12):
        assert run.batch(i, 1e6 if i in (6, 9) else 1.0) is None


def test_old_incidents_are_discarded() -> None:
    run = Run(every=2, after_skips=5)
    for i in range(40):
        assert run.batch(i, math.nan if i % 4 == 3 else 1.0) is None
    assert len(run.rollback._incidents._bad) <= 4


def test_bad_steps_before_a_snapshot_are_not_skipped_even_if_their_numbers_repeat() -> None:
    run = Run(every=4, after_skips=6)
    for i in range(4):
        run.batch(i)
    for i in range(4, 10):
        rewind = run.batch(i, math.nan)
    assert (rewind.step, rewind.position, rewind.skip) == (4, 3, tuple(range(4, 10)))
    for i in range(10, 14):  # steps 5 to 8 again
        run.batch(i)
    for i in range(14, 20):
        rewind = run.batch(i, math.nan)
    assert (rewind.step, rewind.position, rewind.skip) == (8, 13, tuple(range(14, 20)))


def test_bad_snapshots_do_not_displace_a_good_one() -> None:
    run = Run(every=2, keep=2, after_skips=None)
    for i in range(2):
        run.batch(i)
    at_two = run.state()
    for i in range(2, 4):
        run.batch(i)
    assert run.rollback.snapshots == [2, 4]
    run.ema.weight.data.fill_(math.nan)
    for i in range(4, 12):
        run.batch(i)
    assert run.rollback.snapshots == [2, 12]  # the snapshot of step 4 was never checked
    run.rollback.trigger()
    assert same(run.state(), at_two)
    assert run.ema.weight.isfinite().all()
    for i in range(4, 8):
        run.batch(i)
    assert run.rollback.snapshots == [4, 6]


def test_every_second_snapshot_is_checked_during_the_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks = []
    take = Snapshot.take

    def watched(self, *args, check, **kwargs):
        checks.append(check)
        return take(self, *args, check=check, **kwargs)

    monkeypatch.setattr(Snapshot, "take", watched)
    run = Run(every=1, keep=2)
    for i in range(6):
        run.batch(i)
    assert checks == [True, True, False, True, False, True, False]
    checks.clear()
    single = Run(every=1, keep=1)  # with keep=1 there is no other snapshot to protect
    single.batch(0)
    assert checks == [False, False]


def test_a_nan_number_in_a_snapshot_is_found() -> None:
    run = Run()
    rollback = Rollback(run.opt, {"model": run.model}, keep=2)
    run.batch(0)
    run.opt.param_groups[0]["lr"] = math.nan
    rollback.snapshot()
    assert rollback.trigger().step == 0
    assert run.opt.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("with_lr", [True, False])
def test_a_tensor_learning_rate_is_updated_in_place(with_lr: bool) -> None:
    rates = torch.tensor(0.5), torch.tensor(0.25)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    opt = GuardedOptimizer(torch.optim.AdamW(groups, fused=True))
    lr = GuardedLR(opt) if with_lr else None
    rollback = Rollback(opt, {}, lr=lr, lr_factor=0.5)
    for rate in rates:
        rate.fill_(9.0)
    for _ in range(2):
        rollback.trigger()
        assert all(g["lr"] is rate for g, rate in zip(opt.param_groups, rates, strict=True))
    factor = 0.25 if with_lr else 1.0
    assert [rate.item() for rate in rates] == [0.5 * factor, 0.25 * factor]


def test_a_deleted_rollback_leaves_nothing_behind() -> None:
    run = Run(every=1)
    run.batch(0)
    assert len(run.opt._optimizer_step_pre_hooks) == 2
    del run.rollback
    assert len(run.opt._optimizer_step_pre_hooks) == 1  # the hook of the schedule
    assert not run.opt._optimizer_load_state_dict_post_hooks
    assert len(run.opt._recorder._inboxes) == 1  # the inbox of the schedule
    run.opt.step()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"every": 0}, ValueError, "every=0"),
        ({"keep": 0}, ValueError, "keep=0"),
        ({"every": True}, ValueError, "every=True"),
        ({"after_skips": -1}, ValueError, "after_skips=-1"),
        ({"after_spikes": 0}, ValueError, "after_spikes=0"),
        ({"max_attempts": 0}, ValueError, "max_attempts=0"),
        ({"lr_factor": 1.5}, ValueError, "lr_factor=1.5"),
        ({"lr_factor": 0.0}, ValueError, "lr_factor=0.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Run(**kwargs)


def test_an_object_without_state_is_an_error() -> None:
    opt = GuardedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    with pytest.raises(TypeError, match=r"objects\['loader'\] is a list"):
        Rollback(opt, {"loader": [1, 2]})
    with pytest.raises(TypeError, match=r"must be a fastguard\.GuardedOptimizer"):
        Rollback(opt.optimizer, {})  # type: ignore[arg-type]
