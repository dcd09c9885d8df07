"""Param groups that are added, removed or copied during a run."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    StepLR,
)

from fastguard import GuardedLR, Warmup
from fastguard.errors.versions import STRICT_LAMBDAS
from guardtest.scheduled import BAD, GOOD, guarded, play
from guardtest.versions import needs


@pytest.mark.parametrize("constant", [True, False])
def test_an_added_param_group_is_scheduled_too(constant: bool) -> None:
    opt = guarded(momentum=0.9)
    schedule = opt if constant else StepLR(opt, step_size=2, gamma=0.5)
    lr = GuardedLR(schedule, floor=0.2, backoff=0.5, warmup=Warmup(steps=2, lr=0.6, momentum=0.5))
    play(opt, lr, [GOOD])
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5})
    play(opt, lr, [GOOD, BAD])
    scheduled = [1.0, 0.5] if constant else [0.5, 0.25]
    assert [g["lr"] for g in opt.param_groups] == [max(0.2, 0.5 * s) for s in scheduled]
    assert [g["momentum"] for g in opt.param_groups] == [0.9, 0.9]
    with lr.in_force():
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 4.0})
    assert lr.state_dict()["scheduled"] == lr.get_last_lr()
    lr.lower()
    with lr.in_force():
        assert opt.param_groups[2]["lr"] == 1.0


def test_an_added_group_uses_the_last_entry_of_per_group_arguments(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fastguard")
    opt = guarded(n_groups=2, momentum=0.9)
    warmup = Warmup(steps=4, lr=(0.5, 0.0), momentum=[0.7, 0.1])
    lr = GuardedLR(opt, floor=[0.0, 0.05], warmup=warmup)
    play(opt, lr, [GOOD])
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1})
    opt.step()  # applied before the next call of lr.step
    assert opt.param_groups[2]["lr"] == 0.05
    assert opt.param_groups[2]["momentum"] == pytest.approx(0.1 + 0.8 / 4)
    play(opt, lr, [GOOD, GOOD, GOOD])
    assert [g["lr"] for g in opt.param_groups] == [1.0, 1.0, 0.1]
    assert (
        "param group 2 was added with lr 0.1 and floor 0.05; assign to lr.floor[2]" in caplog.text
    )
    lr.floor[2] = 0.3
    play(opt, lr, [GOOD])
    assert opt.param_groups[2]["lr"] == 0.3


def test_the_floor_of_a_new_group_can_be_set_before_the_next_step() -> None:
    opt = guarded(n_groups=2)
    lr = GuardedLR(opt, floor=[0.0, 0.05])
    for floor in (0.3, 0.4):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1})
        lr.floor[-1] = floor
    play(opt, lr, [GOOD])
    assert [g["lr"] for g in opt.param_groups] == [1.0, 1.0, 0.3, 0.4]
    assert lr.floor == [0.0, 0.05, 0.3, 0.4]


def test_several_groups_join_at_once_and_one_after_the_other() -> None:
    opt = guarded()
    schedule = CosineAnnealingLR(opt, T_max=10)
    lr = GuardedLR(schedule, floor=(1e-6,), warmup=Warmup(steps=1, lr=[0.0]), backoff=0.5)
    play(opt, lr, [GOOD, BAD])
    for n in (2, 1):
        for _ in range(n):
            opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.01})
        play(opt, lr, [GOOD])
    rates = [g["lr"] for g in opt.param_groups]
    assert len(rates) == 4 and rates[1] == rates[2] and all(0 < r < 0.5 for r in rates)
    saved = copy.deepcopy((opt.state_dict(), lr.state_dict()))
    opt.load_state_dict(saved[0])
    lr.load_state_dict(saved[1])
    assert [g["lr"] for g in opt.param_groups] == rates


@needs(STRICT_LAMBDAS)
def test_an_error_of_the_schedule_changes_nothing() -> None:
    """torch's `LambdaLR` does not support groups that are added later."""
    opt = guarded()
    lr = GuardedLR(LambdaLR(opt, lambda n: 0.5**n), warmup=Warmup(steps=4, lr=[0.25]))
    play(opt, lr, [GOOD])
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5})
    opt.step()
    for _ in range(2):
        with pytest.raises(ValueError, match="zip") as error:
            lr.step()
        assert "create the schedule again" in error.value.__notes__[0]
        assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.375, 0.375])


def test_a_removed_param_group_is_an_error() -> None:
    opt = guarded(n_groups=2)
    lr = GuardedLR(opt)
    del opt.param_groups[1]
    with pytest.raises(ValueError, match=r"has 1 param groups, but GuardedLR has 2.*create a new"):
        lr.step()


def test_a_removed_param_group_is_an_error_although_another_one_has_its_place() -> None:
    opt = guarded(n_groups=2)
    lr = GuardedLR(opt)
    del opt.param_groups[0]
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5})
    rates = [g["lr"] for g in opt.param_groups]
    with pytest.raises(
        ValueError, match=r"param group 0 .* not the same as before.*create a new GuardedLR"
    ):
        lr.step()
    assert [g["lr"] for g in opt.param_groups] == rates


def test_param_groups_may_be_copied_or_get_other_parameters() -> None:
    opt = guarded(n_groups=2)
    lr = GuardedLR(opt, backoff=0.5)
    opt.load_state_dict(opt.state_dict())  # replaces the dicts of the param groups
    play(opt, lr, [GOOD])
    opt.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(1))
    before = [g["lr"] for g in opt.param_groups]
    play(opt, lr, [BAD])
    assert [g["lr"] for g in opt.param_groups] == [rate / 2 for rate in before]
    opt.load_state_dict(opt.state_dict())  # replaces the dicts a second time
    play(opt, lr, [BAD])
    assert [g["lr"] for g in opt.param_groups] == [rate / 4 for rate in before]


def test_a_state_with_other_groups_changes_nothing() -> None:
    two = guarded(n_groups=2)
    saved = GuardedLR(two).state_dict()
    opt = guarded()
    lr = GuardedLR(opt)
    with pytest.raises(ValueError, match=r"with 2 param groups.*has 1.*after add_param_group"):
        lr.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 1.0
