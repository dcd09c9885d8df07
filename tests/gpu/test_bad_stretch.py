"""On a GPU, schedules and rollback act one step late but lose no verdict."""

import copy
import math

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR

from fastguard import GuardedLR, GuardedOptimizer, Rollback, Threshold
from fastguard.recovery.snapshot import Snapshot

GOOD, BAD = 1.0, math.nan


class Run:
    def __init__(self, lr=1.0, every=100, **rollback):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(8, 8).cuda()
        self.opt = GuardedOptimizer(
            torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True),
            spike={"loss": Threshold(max=10.0, action="record")},
        )
        assert self.opt.sync_free
        self.lr = GuardedLR(ExponentialLR(self.opt, gamma=0.5), backoff=0.5, recovery=2)
        self.ema = torch.nn.Linear(8, 8).cuda()
        objects = {"model": self.model, "ema": self.ema}
        self.rollback = Rollback(self.opt, objects, lr=self.lr, every=every, **rollback)
        self.batch = 0

    def step(self, loss):
        self.opt.zero_grad()
        self.model(torch.ones(4, 8, device="cuda")).square().mean().backward()
        self.opt.step(loss=loss)
        self.lr.step()
        self.batch += 1
        return self.rollback.step(position=self.batch)

    def rates(self, losses):
        """The learning rate after each step."""
        seen = []
        for loss in losses:
            self.step(loss)
            seen.append(float(self.opt.param_groups[0]["lr"]))
        return seen

    def tensors(self):
        state = self.opt.state_dict()["state"].values()
        found = [*self.model.state_dict().values(), *(t for entry in state for t in entry.values())]
        return [t.clone() for t in found]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_a_schedule_follows_one_step_behind():
    assert Run().rates([GOOD] * 4) == [1.0, 0.5, 0.25, 0.125]
    assert Run().rates([GOOD, BAD, GOOD, GOOD, GOOD]) == [1.0, 0.5, 0.25, 0.125, 0.125]


@pytest.mark.parametrize("script", [[GOOD] * 6, [GOOD, GOOD, BAD, GOOD, GOOD, BAD]], ids=str)
def test_a_resume_loses_no_verdict(script):
    whole = Run().rates(script)
    first, second = Run(), Run()
    head = first.rates(script[:3])
    saved = copy.deepcopy([x.state_dict() for x in (first.model, first.opt, first.lr)])
    for thing, state in zip((second.model, second.opt, second.lr), saved, strict=True):
        thing.load_state_dict(state)
    assert head + second.rates(script[3:]) == whole
    assert head + first.rates(script[3:]) == whole
    assert same(first.tensors(), second.tensors())


def test_snapshots_do_not_change_when_a_schedule_gets_its_verdicts():
    assert Run(every=2).rates([GOOD] * 6) == Run(every=100).rates([GOOD] * 6)


def test_a_step_that_spiked_is_in_no_snapshot():
    run = Run(every=2, after_skips=None, after_spikes=2, lr_factor=1.0)
    run.rates([GOOD, GOOD])
    at_two = run.tensors()
    assert run.rollback.snapshots == [0, 2]
    assert run.step(99.0) is None
    assert run.step(99.0) is None  # its verdict has not arrived yet
    rewind = run.step(GOOD)
    assert (rewind.step, rewind.position, rewind.skip) == (2, 2, (3, 4))
    assert same(run.tensors(), at_two)


def test_consecutive_skips_restore_weights_and_learning_rate_bitwise():
    run = Run(every=3, after_skips=2, lr_factor=1.0)
    run.rates([GOOD] * 3)
    at_three = run.tensors()
    expected = copy.deepcopy(run.lr.state_dict())
    assert expected["coming"] == [[3, "applied"]]
    assert [run.step(BAD), run.step(BAD)] == [None, None]
    rewind = run.step(GOOD)
    assert (rewind.step, rewind.position, rewind.skip) == (3, 3, (4, 5))
    assert same(run.tensors(), at_three)
    assert run.lr.state_dict() == expected


def test_steps_between_snapshots_do_not_wait():
    run = Run(every=100)
    run.rates([GOOD] * 3)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.step(GOOD)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert run.opt.applied_steps == 6


def test_training_continues_while_a_snapshot_is_copied():
    model = torch.nn.Linear(4096, 4096).cuda()
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    rollback = Rollback(opt, {"model": model}, every=100)
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        opt.step()
        rollback.snapshot()
        then = model.weight.detach().clone()
        for _ in range(3):  # the first step waits for the copy, on the device
            opt.step()
        assert not torch.equal(model.weight, then)
        rollback.trigger()
        assert torch.equal(model.weight, then)


def test_a_bad_snapshot_is_named_and_replaces_no_good_one():
    run = Run(every=2, keep=2, after_skips=None)
    run.rates([GOOD] * 4)
    with torch.no_grad():
        run.ema.weight[7, 7] = math.inf
    run.rates([GOOD] * 6)
    assert run.rollback.snapshots == [2, 10]  # the snapshot of step 4 has not been checked
    slot = Snapshot()
    slot.take({"ema": run.ema, "opt": run.opt}, 1, None, run.opt)
    assert slot.nonfinite() == ["ema.weight"]
    assert run.rollback.trigger().step == 2
    assert run.ema.weight.isfinite().all()


def test_a_tensor_learning_rate_stays_on_its_device():
    rate = torch.tensor(0.5, device="cuda")
    run = Run(lr=rate, lr_factor=0.5)
    run.rates([GOOD] * 3)
    run.rollback.trigger()
    assert run.opt.param_groups[0]["lr"] is rate
    assert rate.is_cuda and rate.item() == 0.25
    run.rates([GOOD])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_copies_from_each_device_are_waited_for():
    models = [torch.nn.Linear(2048, 2048).to(f"cuda:{i}") for i in range(2)]
    inner = torch.optim.AdamW([p for m in models for p in m.parameters()], fused=True)
    slot = Snapshot()
    events = slot.take({str(i): m for i, m in enumerate(models)}, 1, None, inner)
    assert set(events) == {p.device for m in models for p in m.parameters()}
    then = [m.weight.detach().clone() for m in models]
    for model in models:
        device = model.weight.device
        torch.cuda.current_stream(device).wait_event(events[device])
        with torch.no_grad():
            model.weight.zero_()
    slot.restore({str(i): m for i, m in enumerate(models)})
    assert all(map(torch.equal, (m.weight for m in models), then))
