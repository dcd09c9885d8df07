"""LBFGS evaluates its closure several times within a step, and the guard undoes a bad step."""

import math

import pytest
import torch

from fastguard import GuardedOptimizer, NonFiniteGradError, Threshold, TrainingDivergedError
from guardtest.training import assert_same_bits, new_parameters, snapshot


class Problem:
    """A quadratic problem whose gradient can be made bad in any evaluation."""

    def __init__(self, search=None, **options):
        self.parameters = new_parameters([(3, 2), (4,)])
        self.inner = torch.optim.LBFGS(self.parameters, max_iter=4, line_search_fn=search)
        self.opt = GuardedOptimizer(self.inner, **options)
        self.target = [torch.ones_like(p) for p in self.parameters]
        self.poison_gradient_from = self.poison_loss_from = math.inf
        self.evaluations = 0

    def closure(self):
        self.opt.zero_grad()
        loss = sum(((p - t) ** 4).sum() for p, t in zip(self.parameters, self.target, strict=True))
        loss.backward()
        if self.evaluations >= self.poison_gradient_from:
            self.parameters[1].grad[2] = math.nan
        if self.evaluations >= self.poison_loss_from:
            loss = loss * math.nan
        self.evaluations += 1
        return loss


SEARCHES = [None, "strong_wolfe"]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_good_steps_equal_torch(search, flat):
    guarded = Problem(search, flat_buckets=flat)
    alone = Problem(search)
    for _ in range(4):
        ours = guarded.opt.step(guarded.closure)
        theirs = alone.inner.step(alone.closure)
        assert ours == theirs
    assert guarded.evaluations > 4
    assert_same_bits(snapshot(guarded.opt), snapshot(alone.inner))
    assert guarded.opt.applied_steps == 4
    record = guarded.opt.records()[0]
    assert math.isfinite(record.losses["loss"])
    assert record.total_norm > 0


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("at", ["first", "later"])
def test_a_bad_step_is_undone_bitwise(search, what, at):
    problem = Problem(search)
    if at == "later":
        for _ in range(2):
            problem.opt.step(problem.closure)
    before = snapshot(problem.opt)
    setattr(problem, f"poison_{what}_from", problem.evaluations + 1)
    problem.opt.step(problem.closure)
    assert problem.opt.skipped_steps == 1
    assert problem.opt.records()[-1].reason == f"nonfinite_{'grad' if what == 'gradient' else what}"
    assert_same_bits(snapshot(problem.opt), before)

    clean = Problem(search)
    problem.poison_gradient_from = problem.poison_loss_from = math.inf
    for _ in range(3 if at == "later" else 1):
        clean.opt.step(clean.closure)
    problem.opt.step(problem.closure)
    assert_same_bits(snapshot(problem.opt), snapshot(clean.opt))


def test_raise_mode_undoes_the_step_first():
    problem = Problem(nonfinite="raise", max_norm=1.0)
    problem.opt.step(problem.closure)
    before = snapshot(problem.opt)
    problem.poison_gradient_from = 0
    with pytest.raises(NonFiniteGradError, match=r"parameter 1 \(4 NaN\)"):
        problem.opt.step(problem.closure)
    assert_same_bits(snapshot(problem.opt), before)


def test_a_nonfinite_loss_ends_the_step_immediately():
    """torch's line search would fail; a loss passed to `step` does not hide the bad loss."""
    problem = Problem("strong_wolfe")
    problem.opt.step(problem.closure)
    before = snapshot(problem.opt)
    problem.poison_loss_from = problem.evaluations + 1
    done = problem.evaluations
    first = problem.opt.step(problem.closure, loss=1.0)
    assert first.isfinite()
    assert problem.evaluations == done + 2
    assert math.isnan(problem.opt.records()[-1].losses["loss"])
    assert_same_bits(snapshot(problem.opt), before)


def test_propagate_mode_keeps_a_bad_step():
    problem = Problem(nonfinite="propagate")
    problem.opt.step(problem.closure)
    problem.poison_gradient_from = 0
    problem.opt.step(problem.closure)
    assert problem.parameters[1].isnan().any()


def test_a_closure_is_needed():
    with pytest.raises(TypeError, match=r"LBFGS.step needs a closure"):
        Problem().opt.step()


def test_a_failing_closure_changes_neither_weights_nor_state():
    problem = Problem()
    problem.opt.step(problem.closure)
    before = snapshot(problem.opt)

    def closure():
        if problem.evaluations > 6:
            raise KeyError("data ran out")
        return problem.closure()

    with pytest.raises(KeyError, match="data ran out"):
        problem.opt.step(closure)
    assert_same_bits(snapshot(problem.opt), before)


def test_ctrl_c_in_a_sink_after_a_good_step_undoes_nothing():
    problem, alone = Problem(), Problem()
    for _ in range(2):
        alone.inner.step(alone.closure)
    problem.opt.step(problem.closure)

    def interrupted(record):
        raise KeyboardInterrupt

    problem.opt.add_sink(interrupted)
    with pytest.raises(KeyboardInterrupt):
        problem.opt.step(problem.closure)
    assert problem.opt.applied_steps == 2
    assert_same_bits(snapshot(problem.opt), snapshot(alone.inner))


def test_the_skip_budget_counts_whole_steps():
    problem = Problem(max_consecutive_skips=1)
    problem.poison_gradient_from = 0
    problem.opt.step(problem.closure)
    with pytest.raises(TrainingDivergedError, match="2 steps in a row"):
        problem.opt.step(problem.closure)


def test_a_resumed_run_equals_an_uninterrupted_one():
    straight = Problem()
    for _ in range(4):
        straight.opt.step(straight.closure)
    first, second = Problem(), Problem()
    for _ in range(2):
        first.opt.step(first.closure)
    with torch.no_grad():
        for p, q in zip(second.parameters, first.parameters, strict=True):
            p.copy_(q)
    second.opt.load_state_dict(first.opt.state_dict())
    for _ in range(2):
        second.opt.step(second.closure)
    assert_same_bits(snapshot(second.opt), snapshot(straight.opt))
    assert second.opt.applied_steps == 4


def test_no_record_is_clipped_and_one_warning_gives_the_reason(caplog):
    problem = Problem(max_norm=1e-3, spike=Threshold(max=1e-3, action="clip"))
    for _ in range(3):
        problem.opt.step(problem.closure)
    records = problem.opt.records()
    assert [(r.action, r.clip_coef, r.spikes) for r in records] == [
        ("applied", 1.0, ("grad_norm",))
    ] * 3
    (message,) = (r.message for r in caplog.records if "no effect" in r.message)
    assert "max_norm=0.001" in message and "LBFGS" in message and "in the closure" in message
