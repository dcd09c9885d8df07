"""After an exception at any line of a step, counters, records and their subscribers agree on
whether the step was taken, and the run can continue.
"""

import random
from contextlib import suppress
from functools import partial

import pytest
import torch

import fastguard.optim
from fastguard import (
    AGC,
    AdaGC,
    AutoClip,
    GuardedLR,
    GuardedOptimizer,
    NonFiniteGradError,
    Rollback,
    SpikeRule,
    Warmup,
    ZClip,
)
from guardtest.interrupts import interrupted, lines_of
from guardtest.training import assert_same_bits, give_gradients, new_parameters, poison, snapshot

NAN = float("nan")
RULES = {
    "grad_norm": SpikeRule(window=8, sigma=3.0, warmup=4),
    "loss": SpikeRule(window=5, sigma=6.0, warmup=3, action="record"),
}


def counted(cls):
    """Returns a subclass that counts its steps in `done`."""

    class Counted(cls):
        done = 0

        def step(self, closure=None):
            result = super().step(closure)
            self.done += 1
            return result

    return Counted


class Run:
    """A guarded run with all subscribers of its records, and a second run without interrupts.

    Args:
        kind: A key of `KINDS`.
        options: Options of the guard.
        steps_lr: Whether the loop steps the schedule; otherwise it only follows the optimizer.
    """

    def __init__(self, kind, options, *, steps_lr=True):
        self.kind = kind
        self.steps_lr = steps_lr
        self.parameters, self.opt = self.build(options)
        self.twin_parameters, self.twin = self.build(options)
        self.told, self.inbox = [], self.opt.subscribe()
        self.opt.add_sink(self.told.append)
        self.lr = GuardedLR(self.opt, backoff=0.5, recovery=3, warmup=Warmup(steps=5))
        self.twin_lr = GuardedLR(self.twin, backoff=0.5, recovery=3, warmup=Warmup(steps=5))
        self.rollback = Rollback(self.opt, {}, every=7, after_skips=None)
        self.records = []

    def build(self, options):
        parameters = new_parameters()
        groups = [{"params": parameters[:2], "clip_value": 2.0}, {"params": parameters[2:]}]
        inner = KINDS[self.kind](groups)
        return parameters, GuardedOptimizer(inner, **{"max_norm": 3.0, "spike": RULES, **options})

    def feed(self, parameters, i):
        give_gradients(parameters, i)
        if i % 11 == 5:
            poison(parameters)
        elif i % 13 == 7:
            parameters[0].grad *= 100.0

    def ready(self, parameters, opt, i):
        """Prepares gradients and losses; returns the remaining call."""
        loss = NAN if i % 17 == 9 else 1.0 + i % 3
        if self.kind == "LBFGS":

            def closure():
                self.feed(parameters, i)
                return torch.tensor(loss)

            return partial(opt.step, closure, tag=i)
        self.feed(parameters, i)
        return partial(opt.step, loss=loss, tag=i)

    def attempt(self, i, at, within=""):
        """Interrupts a step, repeats it in the second run if it was taken, and returns the line."""
        before = self.opt.steps_taken
        weights = snapshot(self.opt)
        where = []
        step = self.ready(self.parameters, self.opt, i)
        try:
            with interrupted(at, within=within) as where:
                step()
        except KeyboardInterrupt:
            assert where
        except NonFiniteGradError:
            assert self.opt.nonfinite == "raise"
        taken = self.opt.steps_taken - before
        assert taken in (0, 1), where
        if taken:
            self.ready(self.twin_parameters, self.twin, i)()
            if self.steps_lr:
                self.twin_lr.step()
        else:  # the wrapped step itself is never interrupted
            assert_same_bits(snapshot(self.opt), weights)
        if self.steps_lr:
            self.lr.step()
        assert self.rollback.step(position=i) is None
        self.records += self.opt.records()
        self.check(where)
        return where

    def check(self, where):
        opt, twin = self.opt, self.twin
        steps = list(range(1, opt.steps_taken + 1))
        assert torch.is_grad_enabled(), where
        assert opt.steps_taken == opt.applied_steps + opt.skipped_steps, where
        assert [r.step for r in self.records] == steps, where
        assert [r.step for r in self.told] == steps, where
        assert [r.step for r in self.inbox] == steps, where
        for name in ("counters", "windows", "rings", "limits"):
            assert torch.equal(getattr(opt._state, name), getattr(twin._state, name)), (where, name)
        if self.kind == "plain":  # the other kinds are also called for a skipped step
            assert opt.optimizer.done == opt.applied_steps, where
        assert_same_bits(snapshot(opt), snapshot(twin))
        if self.steps_lr:
            assert self.lr.get_last_lr() == self.twin_lr.get_last_lr(), where


KINDS = {
    "plain": lambda groups: counted(torch.optim.SGD)(groups, lr=0.1, momentum=0.9),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "fused SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "own AdamW": lambda groups: fastguard.optim.AdamW(groups, lr=0.1, amsgrad=True),
    "own SGD": lambda groups: fastguard.optim.SGD(groups, lr=0.1, momentum=0.9),
    "own Lion": lambda groups: fastguard.optim.Lion(groups, lr=0.01),
    "LBFGS": lambda groups: torch.optim.LBFGS(
        [p for g in groups for p in g["params"]], lr=1e-3, max_iter=2
    ),
}
SETTINGS = {
    "plain": ("plain", {}),
    "fused": ("fused", {}),
    "LBFGS": ("LBFGS", {}),
    "flat": ("plain", {"flat_buckets": True}),
    "flat_parameters": ("fused", {"flat_parameters": True}),
    "raises": ("plain", {"nonfinite": "raise"}),
    "LBFGS, raises": ("LBFGS", {"nonfinite": "raise"}),
    "cleans": ("fused", {"nonfinite": "zero"}),
    "zclip": ("plain", {"max_norm": ZClip(warmup=5)}),
    "autoclip": ("fused", {"max_norm": AutoClip(window=7)}),
    "adagc": ("plain", {"max_norm": AdaGC(warmup=5), "clip_scope": "tensor"}),
    "agc": ("plain", {"max_norm": AGC(0.1), "clip_scope": "unit"}),
    "compiled": ("AdamW", {"compile_step": True}),
    "compiled, cleans": ("AdamW", {"compile_step": True, "nonfinite": "zero"}),
    "own AdamW": ("own AdamW", {"flat_buckets": True}),
    "own SGD, cleans": ("own SGD", {"nonfinite": "zero"}),
    "own SGD, agc": ("own SGD", {"max_norm": AGC(0.1), "clip_scope": "unit"}),
    "own Lion, autoclip": ("own Lion", {"max_norm": AutoClip(window=7)}),
    "flat_parameters of SGD": ("fused SGD", {"flat_parameters": True, "max_norm": ZClip(warmup=5)}),
    "watched": ("plain", {"watch": ("tensor_norms", "update_ratio"), "watch_every": 2}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_interrupt_at_any_line_of_a_step(setting, monkeypatch):
    monkeypatch.setattr("fastguard.guard.compiled_step.BACKEND", "eager")
    kind, options = SETTINGS[setting]
    chance = random.Random(setting)
    run, scout = Run(kind, options), Run(kind, options)
    for each in (run, scout):
        each.attempt(0, 10**6)
    lines, n_interrupted = 1000, 0
    for i in range(1, 151):
        if i % 10 == 1:
            with suppress(NonFiniteGradError):
                lines = lines_of(scout.ready(scout.parameters, scout.opt, i))
        n_interrupted += bool(run.attempt(i, chance.randrange(1, lines + 20)))
    assert n_interrupted > 100
    assert run.opt.steps_taken > 10


ROADS = {
    "plain": "read_first.py",
    "fused": "on_device.py",
    "LBFGS": "whole_step.py",
    "flat_parameters": "flat_",
    "agc": "unit_clipping.py",
    "compiled": "compiled_step.py",
    "own AdamW": "in_update.py",
    "watched": "watch/",
}


@pytest.mark.parametrize("setting", ROADS)
def test_an_interrupt_at_each_line_of_each_path(setting, monkeypatch):
    monkeypatch.setattr("fastguard.guard.compiled_step.BACKEND", "eager")
    run = Run(*SETTINGS[setting])
    run.attempt(0, 10**6)
    at, i, missed = 0, 1, 0
    while missed < 4:  # watched and skipped steps have other lines
        missed = 0 if run.attempt(i, at, ROADS[setting]) else missed + 1
        at, i = at + 1, i + 1
    assert at > 10


@pytest.mark.parametrize("setting", ["raises", "LBFGS, raises"])
def test_an_interrupt_while_the_guard_raises(setting):
    """The weights are restored at once, not at the beginning of the next step."""
    kind, options = SETTINGS[setting]
    run, scout = Run(kind, options), Run(kind, options)
    for each in (run, scout):
        each.attempt(0, 10**6)
    step = scout.ready(scout.parameters, scout.opt, 5)  # its gradients are not finite

    def refused():
        with pytest.raises(NonFiniteGradError):
            step()

    lines = lines_of(refused)
    last = range(lines - 200, lines)
    n_interrupted = sum(bool(run.attempt(11 * i + 5, at)) for i, at in enumerate(last))
    assert n_interrupted > 100


def test_an_interrupt_at_each_line_in_which_a_schedule_follows_the_steps():
    run = Run("plain", {}, steps_lr=False)
    places = set()
    for i in range(400):
        if i % 60 == 30:
            for parameters, opt in (run.parameters, run.opt), (run.twin_parameters, run.twin):
                parameters.append(torch.nn.Parameter(torch.ones(1 + i // 60)))
                opt.add_param_group({"params": parameters[-1:], "lr": 0.1})
        places.update(run.attempt(i, i % 60 if i % 3 else 10**6, "recovery"))
    assert len(places) > 20
    assert [r.lr for r in run.records] == [r.lr for r in run.twin.records()]
    rates = [[group["lr"] for group in opt.param_groups] for opt in (run.opt, run.twin)]
    assert rates[0] == rates[1]


def test_losses_observed_before_an_interrupted_step_count_in_the_next_attempt():
    parameters, opt = Run("plain", {}).build({})
    n_tried_again = 0
    for at in range(0, 500, 3):
        before = opt.steps_taken
        give_gradients(parameters, at)
        opt.observe(2.0)
        opt.observe(4.0)
        with suppress(KeyboardInterrupt), interrupted(at):
            opt.step()
        if opt.steps_taken == before:
            n_tried_again += 1
            opt.step()
        assert opt.records()[-1].losses == {"loss": 3.0}
    assert n_tried_again > 50
