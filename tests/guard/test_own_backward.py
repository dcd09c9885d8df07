"""Optimizers that compute gradients within `step`, from a model or a loss that they reference."""

from functools import partial

import pytest
import torch

from fastguard import GuardedOptimizer
from fastguard.guard.own_backward import OwnBackward

NAN = float("nan")


class HoldsClosure(torch.optim.SGD):
    """Evaluates, changes the weights, evaluates again and steps from the old weights, like GSAM."""

    first_moves = False

    def set_closure(self, evaluate):
        self.evaluate = evaluate

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        if not self.first_moves:
            with torch.enable_grad():
                self.evaluate()
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(0.01)
        with torch.enable_grad():
            loss = self.evaluate()
        with torch.no_grad():
            for p, values in zip(parameters, before, strict=True):
                p.copy_(values)
        super().step()
        return loss


class MovesFirst(HoldsClosure):
    first_moves = True


class TakesLoss(torch.optim.Adam):
    """Calls `backward` on its argument, whose graph can be used only once."""

    def step(self, objective):
        self.zero_grad()
        objective.backward()
        super().step()


KINDS = {
    "holds a closure": (HoldsClosure, lambda opt, f: (opt.set_closure(f), opt.step())[1]),
    "moves first": (MovesFirst, lambda opt, f: (opt.set_closure(f), opt.step())[1]),
    "partial": (HoldsClosure, lambda opt, f: (opt.set_closure(partial(f)), opt.step())[1]),
    "takes a loss": (TakesLoss, lambda opt, f: opt.step(f(backward=False))),
}


class Run:
    """A regression with bad batches on request."""

    def __init__(self, kind, guarded, **options):
        torch.manual_seed(0)
        self.make, self.take = KINDS[kind]
        self.model = torch.nn.Linear(3, 2)
        self.inner = self.make(self.model.parameters(), lr=0.1)
        self.opt = GuardedOptimizer(self.inner, **options) if guarded else self.inner

    def step(self, scale=1.0):
        x = torch.randn(4, 3) * scale

        def evaluate(backward=True):
            self.opt.zero_grad()
            loss = self.model(x).square().mean()
            if backward:
                loss.backward()
            return loss

        return self.take(self.opt, evaluate)

    def values(self):
        state = [v for s in self.inner.state.values() for v in s.values() if v is not None]
        return [t.detach().clone() for t in (*self.model.parameters(), *state)]


def same(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_bad_steps_are_undone_and_good_steps_equal_the_bare_optimizer(kind, bad):
    guarded, bare = Run(kind, True), Run(kind, False)
    for i in range(5):
        if i == bad:
            before = guarded.values()
            guarded.step(scale=NAN)
            same(guarded.values(), before)
        state = torch.random.get_rng_state()
        ours = guarded.step()
        torch.random.set_rng_state(state)
        theirs = bare.step()
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    same(guarded.values(), bare.values())
    actions = ["applied"] * 5
    actions.insert(bad, "skipped")
    assert [r.action for r in guarded.opt.records()] == actions


def test_changing_weights_before_an_unknown_model_is_refused_and_not_counted():
    p = torch.nn.Parameter(torch.ones(2))

    class Global(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                p.add_(0.1)
            with torch.enable_grad():
                p.square().sum().backward()
            super().step()

    opt = GuardedOptimizer(Global([p], lr=0.1))
    with pytest.raises(TypeError, match=r"Global\.step computes gradients after changing"):
        opt.step()
    assert opt.steps_taken == opt.applied_steps == 0 and not opt.records()


def test_the_first_parameter_may_be_frozen():
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    p = torch.nn.Parameter(torch.ones(2))

    class Evaluates(torch.optim.SGD):
        def step(self, closure=None):
            self.zero_grad()
            with torch.enable_grad():
                (p * self.factor).sum().backward()
            super().step()

    opt = GuardedOptimizer(Evaluates([frozen, p], lr=0.1))
    for factor in (1.0, NAN, 2.0):
        opt.factor = opt.optimizer.factor = factor
        opt.step()
    assert opt.skipped_steps == 1
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.7))


def test_only_the_first_step_is_observed(monkeypatch):
    entered = []
    enter = OwnBackward.__enter__
    monkeypatch.setattr(OwnBackward, "__enter__", lambda s: (entered.append(1), enter(s))[1])

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    for kind, times in ((Own, 1), (torch.optim.SGD, 0)):
        entered.clear()
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        opt = GuardedOptimizer(kind([p], lr=0.1))
        for _ in range(3):
            opt.step()
        assert len(entered) == times and not p._post_accumulate_grad_hooks


def test_a_held_model_gives_no_warning_that_nothing_is_trained(caplog):
    Run("holds a closure", True).step()
    assert "nothing is trained" not in caplog.text
