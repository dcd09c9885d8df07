"""An overflow that only lowers a loss scale is not an incident, because the scaler handles it."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

from fastguard import (
    CheckpointStore,
    GuardedLR,
    GuardedOptimizer,
    NonFiniteGradError,
    Rollback,
    SpikeRule,
    TrainingDivergedError,
)
from fastguard.guard.grad_scaler import floor_of, keep_lower_scales

NAN, INF = math.nan, math.inf
FITS = 512.0  # the largest scale at which the fp16 gradients of `Run` are finite


class Run:
    """A loop in fp16 with a GradScaler, as in torch's documentation."""

    def __init__(self, scaler, *, fused=False, unscale=False, observe=False, **options):
        self.w = nn.Parameter(torch.zeros(8, 8))
        inner = torch.optim.AdamW([self.w], lr=1e-3, fused=fused)
        self.opt = GuardedOptimizer(inner, max_norm=1.0, **options)
        self.scaler, self.unscale, self.observe = scaler, unscale, observe

    def step(self, factor=1.0, loss=None):
        """One step; its gradients are 64 * factor in fp16, times the scale."""
        with torch.autocast("cpu", dtype=torch.float16):
            y = torch.ones(64, 8) @ self.w
        self.scaler.scale(factor * y.float().sum()).backward()
        if self.unscale:
            self.scaler.unscale_(self.opt)
        if self.observe:
            self.opt.observe(1.0 if loss is None else loss)
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad()

    def steps(self, n):
        for _ in range(n):
            self.step()


def scaler(scale=2.0**16, interval=2000, **settings):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval, **settings)


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="fastguard")
    return caplog


def warnings_of(log):
    return [r.message for r in log.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("observe", [False, True], ids=["", "loss"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
def test_the_search_for_a_scale_is_not_an_incident(fused, unscale, observe, log):
    run = Run(
        scaler(),
        fused=fused,
        unscale=unscale,
        observe=observe,
        max_consecutive_skips=2,
        spike=SpikeRule(window=4, warmup=2),
    )
    lr = GuardedLR(run.opt, backoff=0.5)
    rollback = Rollback(run.opt, {"scaler": run.scaler}, after_skips=2)
    before = run.w.detach().clone()
    for i in range(12):
        run.step()
        lr.step()
        assert rollback.step(i) is None
        assert torch.equal(run.w, before) == (run.scaler.get_scale() > FITS or i == 6)
    assert run.scaler.get_scale() == FITS
    records = run.opt.records()
    assert [(r.action, r.reason) for r in records[:7]] == [("skipped", "loss_scale")] * 7
    assert not any(r.is_incident for r in records)
    assert [r.consecutive_skips for r in records] == [0] * 12
    opt = run.opt
    assert (opt.applied_steps, opt.skipped_steps, opt.loss_scale_skips) == (5, 7, 7)
    assert opt.param_groups[0]["lr"] == 1e-3
    assert warnings_of(log) == []
    assert sum("skipped because of loss_scale: " in r.message for r in log.records) == 3
    run.opt._recorder._lines.flush()
    assert "and 4 more skipped because of loss_scale (steps 4 to 7)" in log.messages[-1]


def test_a_growing_scale_that_overflows_once_is_not_an_incident(log):
    run = Run(scaler(FITS, interval=5), max_consecutive_skips=1)
    lr = GuardedLR(run.opt, backoff=0.5, recovery=8)
    lr.lower()
    rollback = Rollback(run.opt, {"scaler": run.scaler}, after_skips=1, every=4)
    for i in range(30):
        run.step()
        lr.step()
        assert rollback.step(i) is None
    assert run.opt.skipped_steps == run.opt.loss_scale_skips == 5
    assert lr.backoffs == 0  # a search does not end a series of good steps
    assert len(rollback.snapshots) == 2 and max(rollback.snapshots) >= 24
    assert [w for w in warnings_of(log) if "recovered" not in w] == []


def test_raise_mode_does_not_raise_during_the_search():
    run = Run(scaler(), nonfinite="raise")
    run.steps(9)
    assert (run.opt.applied_steps, run.scaler.get_scale()) == (2, FITS)
    with pytest.raises(NonFiniteGradError, match="parameter 0"):
        for _ in range(30):
            run.step(factor=INF)
    assert run.scaler.get_scale() == 1.0  # any overflow at a larger scale may be due to the scale


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_the_other_modes_skip_as_torch_does(nonfinite):
    run, alone = Run(scaler(), nonfinite=nonfinite), Run(scaler())
    alone.opt = torch.optim.AdamW([alone.w], lr=1e-3)
    run.steps(10)
    for _ in range(10):
        alone.step()
    assert run.scaler.get_scale() == alone.scaler.get_scale() == FITS
    torch.testing.assert_close(run.w, alone.w)
    assert [r.reason for r in run.opt.records()] == ["loss_scale"] * 7 + [None] * 3


def test_an_overflow_at_the_minimum_scale_is_an_incident(log):
    run = Run(scaler(4.0), max_consecutive_skips=2)
    lr = GuardedLR(run.opt, backoff=0.5)
    for _ in range(4):
        run.step(factor=INF)
        lr.step()
    assert [r.reason for r in run.opt.records()] == ["loss_scale"] * 2 + ["nonfinite_grad"] * 2
    assert lr.backoffs == 2
    assert len([w for w in warnings_of(log) if "nonfinite_grad" in w]) == 2
    with pytest.raises(TrainingDivergedError, match="3 steps in a row"):
        run.step(factor=INF)


@pytest.mark.parametrize(
    ("name", "minimum"),
    [
        ("min_scale", 64.0),
        ("_min_scale", 64.0),
        ("min_loss_scale", 64.0),
        ("min_scale", torch.tensor([64.0])),
        ("min_scale", torch.tensor(64.0, dtype=torch.float64)),
    ],
)
def test_a_scaler_may_define_its_minimum_scale(name, minimum):
    class Floored(torch.amp.GradScaler):
        pass

    setattr(Floored, name, minimum)
    run = Run(Floored("cpu", init_scale=256.0))
    for _ in range(4):
        run.step(factor=INF)
    assert [r.is_incident for r in run.opt.records()] == [False, False, True, True]


def test_minimum_scales():
    assert floor_of(None) == floor_of(scaler()) == 1.0
    for unusable in ("low", None, True):
        scaler_like = scaler()
        scaler_like.min_scale = unusable
        assert floor_of(scaler_like) == 1.0


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("loss", [NAN, INF])
def test_a_non_finite_loss_is_an_incident_at_any_scale(loss, unscale):
    run = Run(scaler(), observe=True, unscale=unscale)
    run.step(loss=loss)
    run.step()
    first, second = run.opt.records()
    assert (first.reason, first.is_incident) == ("nonfinite_grad", True)
    assert (second.reason, second.consecutive_skips) == ("loss_scale", 1)


def test_without_an_active_scaler_every_overflow_is_an_incident():
    run = Run(torch.amp.GradScaler("cpu", enabled=False))
    run.step(factor=INF)
    assert run.opt.records()[0].is_incident
    # This also holds if found_inf is set but neither the scale nor the scaler is found.
    run.w.grad = torch.full_like(run.w, INF)
    run.opt.grad_scale, run.opt.found_inf = None, torch.ones(())
    run.opt.step()
    assert run.opt.records()[0].is_incident


def test_the_scaler_is_found_through_wrappers_of_trainers():
    """Hooks, the counter of a scheduler, the step of a subclass, methods on the instance."""

    class Scaler(torch.amp.GradScaler):
        def step(self, optimizer, *args, **kwargs):
            return super().step(optimizer, *args, **kwargs)

    run = Run(Scaler("cpu"), unscale=True)
    torch.optim.lr_scheduler.StepLR(run.opt, 10)
    run.opt.register_step_pre_hook(lambda *_: None)
    for _ in range(4):
        plain = run.opt.step
        run.opt.step = lambda *args, plain=plain, **kwargs: plain(*args, **kwargs)
    run.steps(8)
    assert (run.opt.loss_scale_skips, run.opt.applied_steps) == (7, 1)


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
def test_a_rollback_does_not_restore_a_larger_scale(stored, tmp_path):
    run = Run(scaler(), observe=True)
    store = CheckpointStore(tmp_path) if stored else None
    rollback = Rollback(run.opt, {"scaler": run.scaler}, after_skips=1, store=store)
    for i in range(9):
        run.step()
        rollback.step(i)
    assert rollback.snapshots == [0]  # with a scale of 65536
    run.step(loss=NAN)
    assert rollback.step(9).step == 0
    assert run.scaler.get_scale() == FITS
    run.step()
    assert run.opt.applied_steps == 1


class Trainer:
    """Hides its scaler in a list two attributes deep."""

    def __init__(self, scaler):
        self.precision = type("Precision", (), {})()
        self.precision.scalers = [scaler]

    def state_dict(self):
        return self.precision.scalers[0].state_dict()

    def load_state_dict(self, state_dict):
        self.precision.scalers[0].load_state_dict(state_dict)


def test_a_rollback_does_not_restore_a_larger_scale_wherever_the_scaler_is_kept():
    run = Run(scaler())
    rollback = Rollback(run.opt, {"trainer": Trainer(run.scaler)}, after_skips=None)
    run.steps(9)
    rollback.trigger()
    assert run.scaler.get_scale() == FITS
    twin = copy.deepcopy(run.opt)
    assert run.opt.scaler_in_use is run.scaler and twin.scaler_in_use is None


def test_a_rollback_restores_a_smaller_scale():
    run = Run(scaler(2.0, interval=1), observe=True)
    rollback = Rollback(run.opt, {"scaler": run.scaler}, after_skips=1)
    run.steps(3)
    assert run.scaler.get_scale() == 16.0
    run.step(loss=NAN)
    assert rollback.step() is not None
    assert run.scaler.get_scale() == 2.0


def test_keep_lower_scales():
    class Plugin:
        def __init__(self):
            self.scaler = scaler(8.0)

    def loaded(now, restored):
        plugin = Plugin()
        if now is not None:
            plugin.scaler.scale(torch.ones(()))
            plugin.scaler._scale.fill_(now)
        with keep_lower_scales([plugin, nn.Linear(1, 1), object(), 3]):
            state = plugin.scaler.state_dict()
            plugin.scaler.load_state_dict({**state, "scale": restored})
        return plugin.scaler.get_scale()

    assert loaded(4.0, 32.0) == 4.0
    assert loaded(64.0, 32.0) == 32.0
    assert loaded(0.0, 32.0) == loaded(NAN, 32.0) == 32.0  # unusable scales are replaced
    assert loaded(None, 32.0) == 8.0 and loaded(None, 2.0) == 2.0


def test_a_resumed_schedule_knows_which_skips_were_not_incidents():
    run = Run(scaler())
    lr = GuardedLR(run.opt, backoff=0.5)
    run.steps(3)
    saved = lr.state_dict()
    again = Run(scaler())
    resumed = GuardedLR(again.opt, backoff=0.5)
    resumed.load_state_dict(saved)
    resumed.step()
    assert resumed.backoffs == 0
    saved["told"] = [[1, "skipped"]]  # as saved before reasons existed
    resumed.load_state_dict(saved)
    resumed.step()
    assert resumed.backoffs == 1


def test_a_checkpoint_after_a_search_is_clean(tmp_path):
    run = Run(scaler(), observe=True)
    with CheckpointStore(tmp_path) as store:
        for step in range(9):
            run.step()
            store.save(model=run.opt, step=step)
        assert store.last().clean and store.last().skipped_steps == 0
        assert store.save(model=run.opt, step=9, incidents=run.opt.records()).clean
        run.step(loss=NAN)
        assert store.save(model=run.opt, step=10).incidents == 1


def test_counters_are_saved_in_the_state():
    run = Run(scaler())
    run.steps(9)
    again = Run(scaler())
    again.opt.load_state_dict(run.opt.state_dict())
    assert (again.opt.loss_scale_skips, again.opt.skipped_steps) == (7, 7)
