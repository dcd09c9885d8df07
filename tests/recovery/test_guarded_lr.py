"""`GuardedLR` takes skipped steps into account; the tests play scripts with known numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import fastguard
from fastguard import GuardedLR, GuardedOptimizer, StepRecord, Warmup
from guardtest.scheduled import BAD, GOOD, guarded, play


def test_the_schedule_advances_only_on_applied_steps() -> None:
    opt = guarded()
    lr = GuardedLR(ExponentialLR(opt, gamma=0.5))
    assert play(opt, lr, [GOOD, BAD, BAD, GOOD]) == [0.5, 0.5, 0.5, 0.25]


def test_an_incident_backs_off_and_applied_steps_recover() -> None:
    opt = guarded()
    lr = GuardedLR(opt, backoff=0.5, recovery=2)
    assert play(opt, lr, [GOOD, BAD, BAD, GOOD, GOOD, GOOD, GOOD, GOOD]) == [
        1.0,
        0.5,
        0.25,
        0.25,
        0.5,
        0.5,
        1.0,
        1.0,
    ]


def test_recovery_is_logged_like_a_backoff(caplog: pytest.LogCaptureFixture) -> None:
    opt = guarded()
    lr = GuardedLR(opt, backoff=0.5, recovery=2)
    play(opt, lr, [GOOD, BAD, BAD, *[GOOD] * 6])
    assert [(r.levelname, r.getMessage()) for r in caplog.records if "of the sched" in r.msg] == [
        ("WARNING", "fastguard: GuardedLR: backed off to 0.5 of the schedule after step 2"),
        ("WARNING", "fastguard: GuardedLR: backed off to 0.25 of the schedule after step 3"),
        ("WARNING", "fastguard: GuardedLR: recovered to 0.5 of the schedule after step 5"),
        ("WARNING", "fastguard: GuardedLR: recovered to 1 of the schedule after step 7"),
    ]


@pytest.mark.filterwarnings("ignore:Detected call")  # the optimizer never steps
def test_a_search_for_a_loss_scale_is_not_an_incident() -> None:
    opt = guarded()
    lr = GuardedLR(ExponentialLR(opt, gamma=0.5), backoff=0.1, recovery=2)
    for action, reason in [("skipped", "loss_scale"), ("applied", None), ("skipped", "loss_scale")]:
        lr._inbox.append(StepRecord(1, 1.0, 1.0, action, reason))
        lr.step()
        saved = lr.state_dict()
    assert (lr.backoffs, lr.clean_steps, lr.get_last_lr()) == (0, 1, [0.5])
    lr._inbox.append(StepRecord(2, 1.0, 1.0, "skipped", "loss_scale"))
    saved = copy.deepcopy(lr.state_dict())
    lr.load_state_dict(saved)
    lr.step()
    assert lr.backoffs == 0


def test_without_recovery_a_backoff_lasts() -> None:
    opt = guarded()
    lr = GuardedLR(opt, backoff=0.5)
    assert play(opt, lr, [BAD] + [GOOD] * 20)[-1] == 0.5


def test_clamping_to_the_floor_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    opt = guarded(lr=1e-3)
    lr = GuardedLR(ExponentialLR(opt, gamma=0.1), floor=1e-6)
    assert play(opt, lr, [GOOD] * 30)[-1] == 1e-6  # plain torch reaches 1e-33
    assert lr.held_at_floor == 27
    assert sum("clamped lr" in message for message in caplog.messages) == 1


def test_the_schedule_never_sees_our_values() -> None:
    """A recursive schedule would compound the back-off, so it must see its own values."""
    plain = guarded()
    guard = guarded()
    alone = CosineAnnealingLR(plain, T_max=10, eta_min=0.1)
    lr = GuardedLR(CosineAnnealingLR(guard, T_max=10, eta_min=0.1), backoff=0.5)
    play(guard, lr, [BAD])
    for _ in range(10):
        plain.step()
        alone.step()
        now = play(guard, lr, [GOOD])[0]
        assert now == pytest.approx(0.5 * alone.get_last_lr()[0], abs=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: LambdaLR(o, lambda n: 0.9**n),
        lambda o: StepLR(o, 2),
        lambda o: OneCycleLR(o, max_lr=1.0, total_steps=20),
        lambda o: SequentialLR(o, [StepLR(o, 1), ExponentialLR(o, 0.5)], milestones=[3]),
    ],
    ids=["lambda", "step", "onecycle", "sequential"],
)
def test_a_clean_run_follows_torch_exactly(make) -> None:
    plain, guard = guarded(momentum=0.9), guarded(momentum=0.9)
    alone, lr = make(plain), GuardedLR(make(guard))
    for _ in range(8):
        plain.step()
        alone.step()
        guard.step()
        lr.step()
        assert guard.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        assert guard.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]


def test_each_group_is_clamped_to_its_own_floor() -> None:
    opt = guarded(n_groups=2)
    lr = GuardedLR(ExponentialLR(opt, gamma=0.5), floor=(0.25, 0.0))
    play(opt, lr, [GOOD, GOOD])
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.25]
    assert lr.held_at_floor == 0  # the schedule's value was the floor itself
    play(opt, lr, [GOOD])
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.125]
    assert lr.held_at_floor == 1


def test_without_a_backoff_incidents_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    opt = guarded()
    lr = GuardedLR(opt)
    play(opt, lr, [BAD, BAD])
    assert (lr.backoffs, lr.backoff_factor) == (0, 1.0)
    assert "backed off" not in caplog.text


def test_a_metric_between_steps_does_not_undo_a_backoff() -> None:
    opt = guarded()
    lr = GuardedLR(ReduceLROnPlateau(opt, patience=0, factor=0.1), backoff=0.5)
    opt.step(loss=BAD)
    lr.step(1.0)
    lr.step(0.5)  # a better metric, without a step
    assert opt.param_groups[0]["lr"] == 0.5


def test_plateau_advances_with_metrics_not_steps() -> None:
    opt = guarded()
    lr = GuardedLR(ReduceLROnPlateau(opt, patience=0, factor=0.1))
    for metric in (1.0, 1.0, 1.0):
        lr.step(metric)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)


def test_groups_warm_up_from_above_and_from_below_and_momentum_too() -> None:
    opt = guarded(lr=0.01, n_groups=2, momentum=0.937)
    lr = GuardedLR(opt, warmup=Warmup(steps=4, lr=(0.1, 0.0), momentum=0.8))
    biases, weights, momenta = [], [], []
    for loss in (GOOD, GOOD, BAD, GOOD, GOOD):
        biases.append(opt.param_groups[0]["lr"])
        weights.append(opt.param_groups[1]["lr"])
        momenta.append(opt.param_groups[0]["momentum"])
        opt.step(loss=loss)
        lr.step()
    assert biases == pytest.approx([0.1, 0.0775, 0.055, 0.055, 0.0325])
    assert weights == pytest.approx([0.0, 0.0025, 0.005, 0.005, 0.0075])
    assert momenta == pytest.approx([0.8, 0.83425, 0.8685, 0.8685, 0.90275])
    for _ in range(2):  # the values do not change any more
        assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.01, 0.01])
        assert opt.param_groups[0]["momentum"] == pytest.approx(0.937)
        play(opt, lr, [GOOD])


def test_a_warm_up_from_below_the_floor_is_clamped(caplog: pytest.LogCaptureFixture) -> None:
    opt = guarded(lr=1e-3)
    lr = GuardedLR(opt, floor=4e-4, warmup=Warmup(steps=4))
    seen = [opt.param_groups[0]["lr"], *play(opt, lr, [GOOD] * 5)]
    assert seen == pytest.approx([4e-4, 4e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert (
        lr.held_at_floor == 0 and "GuardedLR" not in caplog.text
    )  # only values of the schedule below the floor are logged


def test_a_warm_up_leads_to_the_momentum_of_the_schedule_and_resumes_there() -> None:
    def cycle(opt: GuardedOptimizer) -> OneCycleLR:
        return OneCycleLR(opt, max_lr=1.0, total_steps=20)

    plain, guard, other = (guarded(momentum=0.9) for _ in range(3))
    alone, warmup = cycle(plain), Warmup(steps=4, lr=0.0, momentum=0.5)
    lr = GuardedLR(cycle(guard), warmup=warmup)
    for n in range(1, 8):
        plain.step()
        alone.step()
        play(guard, lr, [GOOD])
        wanted = plain.param_groups[0]["momentum"]
        now = guard.param_groups[0]["momentum"]
        assert now == pytest.approx(0.5 + (wanted - 0.5) * min(1.0, n / 4))
        resumed = GuardedLR(cycle(other), warmup=warmup)
        resumed.load_state_dict(copy.deepcopy(lr.state_dict()))
        assert other.param_groups[0]["momentum"] == now  # applied before the next step
        assert resumed.get_last_lr() == lr.get_last_lr()


def test_adam_warms_its_first_beta() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.AdamW([p], betas=(0.9, 0.99)))
    lr = GuardedLR(opt, warmup=Warmup(steps=2, momentum=0.5))
    assert opt.param_groups[0]["betas"] == (0.5, 0.99)
    play(opt, lr, [GOOD, GOOD])
    assert opt.param_groups[0]["betas"] == pytest.approx((0.9, 0.99))


def test_a_tensor_learning_rate_is_updated_in_place() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    rate = torch.tensor(1.0)
    opt = GuardedOptimizer(torch.optim.AdamW([p], lr=rate, fused=True))
    lr = GuardedLR(ExponentialLR(opt, gamma=0.5), floor=0.2, backoff=0.5)
    play(opt, lr, [GOOD, BAD, GOOD])
    assert opt.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.2)


def test_a_schedule_of_the_inner_optimizer_works_with_the_guard_as_argument() -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    schedule = ExponentialLR(inner, gamma=0.5)
    opt = GuardedOptimizer(inner)
    with pytest.raises(TypeError, match="optimizer=guarded"):
        GuardedLR(schedule)
    lr = GuardedLR(schedule, optimizer=opt)
    assert play(opt, lr, [GOOD, BAD, GOOD]) == [0.5, 0.5, 0.25]


def test_lowering_manually_is_permanent() -> None:
    opt = guarded()
    lr = GuardedLR(opt, backoff=0.5, recovery=1)
    lr.lower(0.1)
    assert play(opt, lr, [GOOD, GOOD])[-1] == 0.1
    lr.lower()
    assert play(opt, lr, [GOOD])[-1] == 0.1


def test_a_manual_backoff_recovers_like_an_incident() -> None:
    opt = guarded()
    lr = GuardedLR(opt, backoff=0.5, recovery=2)
    play(opt, lr, [GOOD])
    lr.lower()
    assert play(opt, lr, [GOOD, GOOD]) == [0.5, 1.0]


@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5, math.nan])
def test_a_factor_that_does_not_lower_the_rate_is_an_error(factor: float) -> None:
    opt = guarded()
    with pytest.raises(ValueError, match=f"factor={factor}"):
        GuardedLR(opt).lower(factor)
    assert opt.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"floor": -1.0}, "floor=-1.0"),
        ({"floor": (1.0, 2.0)}, "2 entries for 1"),
        ({"backoff": 0.0}, "backoff=0.0"),
        ({"backoff": 1.5}, "backoff=1.5"),
        ({"recovery": 0}, "recovery=0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GuardedLR(guarded(), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"warmup": 10}, r"warmup=10 must be a fastguard\.Warmup.*Warmup\(steps=10\)"),
        ({"floor": "a"}, r"floor='a' must be a number >= 0"),
        ({"floor": [0.1, None]}, "floor=None is not a number; use a number >= 0"),
        ({"floor": None}, "floor=None is not a number; use a number >= 0"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(kwargs: dict, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        GuardedLR(guarded(n_groups=2), **kwargs)


@pytest.mark.parametrize("lr", [None, "1e-3", lambda step: 0.1], ids=["None", "text", "function"])
def test_a_learning_rate_that_is_not_a_number_is_an_error(lr: object) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    opt = GuardedOptimizer(torch.optim.Optimizer([parameter], {"lr": lr}))
    with pytest.raises(TypeError, match=r"^lr=.* is not a number.* as lr of param group 0$"):
        GuardedLR(opt)
    with pytest.raises(ValueError, match="group 0 has none"):
        GuardedLR(GuardedOptimizer(torch.optim.Optimizer([parameter], {})))


@pytest.mark.parametrize("lr", [None, "1e-3", lambda step: 0.1], ids=["None", "text", "function"])
def test_the_error_names_a_later_group_whose_learning_rate_is_not_a_number(lr: object) -> None:
    opt = guarded(n_groups=2)
    schedule = GuardedLR(opt, floor=[0.01, 0.02])
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr})
    for act in (opt.step, schedule.step):
        with pytest.raises(TypeError, match=r"^lr=.* is not a number.* as lr of param group 2$"):
            act()
    assert opt.steps_taken == 0
    opt.param_groups[2]["lr"] = 0.5
    opt.step()
    assert opt.steps_taken == 1
    assert schedule.floor == [0.01, 0.02, 0.02]


@pytest.mark.parametrize(
    "setting", [{"betas": None}, {"momentum": None}, {"betas": "auto"}], ids=str
)
def test_a_momentum_that_is_not_a_number_is_not_changed(setting: dict) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    inner = torch.optim.SGD([parameter], lr=1.0)
    inner.param_groups[0].update(setting)
    schedule = GuardedLR(GuardedOptimizer(inner), warmup=Warmup(2, momentum=0.5))
    schedule.step()
    assert inner.param_groups[0].items() >= setting.items()


def test_warmup_names_its_bad_arguments() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        Warmup(steps=0)
    with pytest.raises(ValueError, match="lr=-1"):
        Warmup(steps=1, lr=-1.0)
    with pytest.raises(ValueError, match="lr=inf"):
        Warmup(steps=1, lr=math.inf)
    with pytest.raises(ValueError, match="momentum"):
        Warmup(steps=1, momentum=math.nan)


def test_the_wrapped_optimizer_may_be_false_as_a_condition() -> None:
    class Empty(torch.optim.SGD):
        def __len__(self) -> int:
            return 0

    opt = GuardedOptimizer(Empty([torch.nn.Parameter(torch.zeros(1))], lr=0.5))
    schedule = CosineAnnealingLR(opt.optimizer, T_max=10)
    assert not opt and GuardedLR(schedule, optimizer=opt).get_last_lr() == [0.5]


def test_other_code_can_use_guarded_lr_as_a_scheduler() -> None:
    assert issubclass(fastguard.GuardedLR, torch.optim.lr_scheduler.LRScheduler)


def test_in_force_with_a_trainer_that_sets_the_lr_itself() -> None:
    """The trainer's values are restored after each step."""
    opt = guarded()
    lr = GuardedLR(opt, floor=0.3, backoff=0.5, recovery=2)
    for i, (theirs, loss) in enumerate([(1.0, GOOD), (0.8, BAD), (0.8, GOOD), (0.4, GOOD)]):
        opt.param_groups[0]["lr"] = theirs
        with lr.in_force():
            assert opt.param_groups[0]["lr"] == [1.0, 0.8, 0.4, 0.3][i]
            opt.step(loss=loss)
        assert opt.param_groups[0]["lr"] == theirs
    opt.param_groups[0]["lr"] = 0.2
    with pytest.raises(KeyError), lr.in_force():
        assert opt.param_groups[0]["lr"] == 0.3  # two good steps ended the back-off
        raise KeyError
    assert opt.param_groups[0]["lr"] == 0.2
