"""A step that needs its closure has the same result as unguarded, is undone, or is refused."""

import threading

import pytest
import torch

from fastguard import GuardedOptimizer
from fastguard.guard.inner_step import PROVEN_AFTER
from fastguard.guard.read_first import ReadFirst
from fastguard.guard.whole_step import WholeStep
from guardtest.training import assert_same_bits, new_parameters, snapshot

NAN = float("nan")


def one_parameter():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return p


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization: evaluates the gradient at perturbed weights."""

    def __init__(self, parameters, base=torch.optim.SGD, rho=0.05, **kwargs):
        super().__init__(parameters, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "Sharpness Aware Minimization requires closure"
        closure = torch.enable_grad()(closure)
        moved = []
        for group in self.param_groups:
            for p in group["params"]:
                e = group["rho"] * p.grad / (p.grad.norm() + 1e-12)
                p.add_(e)
                moved.append((p, e))
                p.grad = None
        loss = closure()
        for p, e in moved:
            p.sub_(e)
        self.base_optimizer.step()
        return loss


class AliG(torch.optim.Optimizer):
    """Uses the loss divided by the squared norm of the gradient as its step size."""

    def __init__(self, parameters):
        super().__init__(parameters, {"max_lr": 0.1})
        self.n_steps = 0

    def step(self, closure):
        loss = closure()
        with torch.no_grad():
            parameters = [p for g in self.param_groups for p in g["params"]]
            norm = sum(p.grad.square().sum() for p in parameters)
            size = min(0.1, float(loss / norm))
            for p in parameters:
                p.sub_(size * p.grad)
        self.n_steps += 1
        return loss


class ScheduleFreeClosure(torch.optim.Optimizer):
    """Evaluates the gradient at a point other than the weights; counts steps in its param group."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is None:
            raise ValueError("needs a closure to evaluate at y")
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 0.1)
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p]["z"]
                z.sub_(group["lr"] * p.grad)
                p.lerp_(z, 1 / group["k"])
        return loss


class Careless(torch.optim.SGD):
    """Calls its argument without checking it."""

    def step(self, fn=None):
        loss = fn()
        super().step()
        return loss


class Clears(torch.optim.SGD):
    """Clears the gradients before calling its closure."""

    def step(self, closure):
        self.zero_grad()
        loss = closure()
        super().step()
        return loss


class MovesData(torch.optim.SGD):
    """A SAM that perturbs `p.data`, bypassing version counters, and keeps the gradients."""

    def step(self, closure):
        weights = [p for group in self.param_groups for p in group["params"]]
        for p in weights:
            p.data.add_(p.grad, alpha=0.05)
        loss = closure()
        for p in weights:
            p.data.sub_(p.grad, alpha=0.05)
        super().step()
        return loss


class TwoBases(Clears):
    """Like `Clears`, but has a list with one optimizer per parameter."""

    def __init__(self, ps):
        super().__init__(ps, lr=0.1)
        self.bases = [torch.optim.Adam([p], lr=0.1) for p in ps]

    def step(self, closure):
        loss = super().step(closure)
        for base in self.bases:
            base.step()
        return loss


class LineSearch(torch.optim.Optimizer):
    """Halves the rate until the loss falls; evaluates the loss without a backward pass."""

    def __init__(self, ps):
        super().__init__(ps, {"lr": 1.5})

    def step(self, closure):
        loss = closure()
        weights = [(p, p.data.clone()) for group in self.param_groups for p in group["params"]]
        lr = self.param_groups[0]["lr"]
        for _ in range(4):
            for p, start in weights:
                p.data = start - lr * p.grad
            if closure(backward=False) < loss:
                break
            lr /= 2
        return loss


class Moody(torch.optim.SGD):
    """Takes a step that depends on the loss, if there is a loss."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["lr"] = 0.1 if loss is None else 0.01 * float(loss.detach())
        super().step()
        return loss


NEEDY = {
    "SAM": lambda ps: SAM(ps, lr=0.1, momentum=0.9),
    "schedule-free": ScheduleFreeClosure,
    "clears": lambda ps: Clears(ps, lr=0.1, momentum=0.9),
    "moves data": lambda ps: MovesData(ps, lr=0.1, momentum=0.9),
    "line search": LineSearch,
    "bases in a list": TwoBases,
}


EVALUATE_FIRST = {
    "AliG": AliG,
    "careless": lambda ps: Careless(ps, lr=0.1, momentum=0.9),
    "moody": lambda ps: Moody(ps, lr=0.1),
    "torch": lambda ps: torch.optim.Adam(ps, lr=0.1),
    "fused": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
}


class Evaluations:
    def __init__(self, kind):
        self.parameters = new_parameters([(3, 2), (4,)])
        self.inner = {**NEEDY, **EVALUATE_FIRST}[kind](self.parameters)
        self.bad = False
        self.n = 0

    def __call__(self, backward=True):
        self.n += 1
        loss = sum((p - 1.0).square().sum() for p in self.parameters)
        if not backward:
            return loss.detach()
        for p in self.parameters:
            p.grad = None
        loss.backward()
        if self.bad:
            self.parameters[1].grad[2] = NAN
        return loss


def everything(inner):
    base = getattr(inner, "base_optimizer", None)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups]
    more = {} if base is None else {f"base.{k}": v for k, v in snapshot(base).items()}
    for i, each in enumerate(getattr(inner, "bases", ())):
        more |= {f"bases[{i}].{k}": v for k, v in snapshot(each).items()}
    return {**snapshot(inner), **more, "groups": groups, "n": getattr(inner, "n_steps", None)}


@pytest.mark.parametrize("kind", [*NEEDY, *EVALUATE_FIRST])
def test_an_optimizer_with_a_closure_steps_as_if_unguarded(kind):
    guarded, alone = Evaluations(kind), Evaluations(kind)
    opt = GuardedOptimizer(guarded.inner)
    for i in range(6):
        guarded.bad = i in (2, 3)
        guarded()
        before = everything(guarded.inner)
        result = opt.step(guarded)
        assert (type(opt._stepper) is WholeStep) == (kind in NEEDY)
        if guarded.bad:
            assert_same_bits(everything(guarded.inner), before)
        else:
            alone()
            assert result == alone.inner.step(alone)
    assert_same_bits(everything(guarded.inner), everything(alone.inner))
    assert (opt.applied_steps, opt.skipped_steps) == (4, 2)
    assert [r.step for r in opt.records()] == [1, 2, 3, 4, 5, 6]
    if kind in EVALUATE_FIRST:
        assert guarded.n == 12


@pytest.mark.parametrize("kind", EVALUATE_FIRST)
def test_gradients_are_clipped_if_the_closure_is_evaluated_first(kind):
    closure = Evaluations(kind)
    opt = GuardedOptimizer(closure.inner, max_norm=0.5)
    opt.step(closure)
    norm = torch.cat([p.grad.flatten() for p in closure.parameters]).norm()
    assert norm == pytest.approx(0.5, rel=1e-5)
    assert opt.records()[0].action == "clipped"


def test_a_weight_that_is_always_nan_does_not_count_as_changed():
    p, unused = one_parameter(), torch.nn.Parameter(torch.tensor([NAN]))
    opt = GuardedOptimizer(Careless([p, unused], lr=0.1), max_norm=0.5)
    opt.step(lambda: p.detach().sum())
    assert opt.records()[0].action == "clipped"


@pytest.mark.parametrize("kind", [*NEEDY, "AliG", "careless"])
def test_a_step_without_the_required_closure_is_not_counted(kind):
    closure = Evaluations(kind)
    opt = GuardedOptimizer(closure.inner)
    closure()
    with pytest.raises(Exception, match=r"closure|NoneType|fn"):
        opt.step()
    assert opt.steps_taken == opt.applied_steps == 0 and not opt.records()
    opt.step(closure)
    assert opt.applied_steps == 1


def test_an_optimizer_that_changes_weights_before_a_later_evaluation_is_refused():
    class Later(torch.optim.SGD):
        n_steps = 0

        def step(self, closure=None):
            self.n_steps += 1
            if self.n_steps <= PROVEN_AFTER:
                closure()
                super().step()
            else:
                super().step()
                closure()

    opt = GuardedOptimizer(Later([one_parameter()], lr=0.1))
    for _ in range(PROVEN_AFTER):
        opt.step(lambda: torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"Later.step evaluates its closure.*without a guard"):
        opt.step(lambda: torch.tensor(1.0))
    assert opt.steps_taken == opt.applied_steps == len(opt.records()) == PROVEN_AFTER


def test_a_step_that_is_taken_again_draws_the_same_random_numbers():
    class Noisy(torch.optim.SGD):
        """Evaluates at weights with added noise, as BSAM does."""

        def step(self, closure):
            (p,) = self.param_groups[0]["params"]
            noise = 0.1 * torch.randn_like(p)
            p.data.add_(noise)
            loss = closure()
            p.data.sub_(noise)
            super().step()
            return loss

    weights = []
    for guarded in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.ones(4))
        inner = Noisy([p], lr=0.1)
        opt = GuardedOptimizer(inner) if guarded else inner

        def closure(p=p, opt=opt):
            opt.zero_grad()
            with torch.enable_grad():
                loss = torch.nn.functional.dropout(p.square(), 0.5).sum()
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        weights.append(p.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("every", [2, 5])
def test_an_optimizer_that_ascends_only_sometimes_steps_as_if_unguarded(every):
    class Sometimes(torch.optim.SGD):
        """Counts its steps in an attribute that its first step creates."""

        def step(self, closure):
            self.n_steps = getattr(self, "n_steps", 0) + 1
            self.ascends = self.n_steps % every == 0
            loss = closure()
            if self.ascends:
                for p in self.param_groups[0]["params"]:
                    p.data.add_(p.grad, alpha=0.01)
                loss = closure()
            super().step()
            return loss

    closures = [Evaluations("moody"), Evaluations("moody")]
    for closure in closures:
        closure.inner = Sometimes(closure.parameters, lr=0.1, momentum=0.9)
    guarded, alone = closures
    opt = GuardedOptimizer(guarded.inner)
    for _ in range(8):
        opt.step(guarded)
        alone.inner.step(alone)
        assert_same_bits(everything(guarded.inner), everything(alone.inner))
    assert guarded.inner.n_steps == alone.inner.n_steps == opt.applied_steps == 8


class EveryThird(torch.optim.SGD):
    """Evaluates its closure only in every third step, as LookSAM does between its ascents."""

    n_steps = 0

    def step(self, closure=None):
        self.n_steps += 1
        if self.n_steps % 3 == 0:
            self.zero_grad()
            closure()
        super().step()


def test_an_optimizer_that_needs_its_closure_only_sometimes_steps_as_if_unguarded():
    closures = [Evaluations("moody"), Evaluations("moody")]
    for closure in closures:
        closure.inner = EveryThird(closure.parameters, lr=0.1, momentum=0.9)
    guarded, alone = closures
    opt = GuardedOptimizer(guarded.inner)
    for i in range(8):
        for closure in closures:
            closure()
        opt.step(guarded)
        alone.inner.step(alone)
        assert (type(opt._stepper) is WholeStep) == (i >= 2)
        assert_same_bits(everything(guarded.inner), everything(alone.inner))
    guarded.bad = True
    before = everything(guarded.inner)
    guarded()
    opt.step(guarded)
    assert_same_bits(everything(guarded.inner), before)
    assert (opt.applied_steps, opt.skipped_steps) == (8, 1)


def test_state_that_cannot_be_copied_does_not_prevent_a_step_with_a_closure():
    class Holds(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            super().step()
            return loss

    p = one_parameter()
    opt = GuardedOptimizer(Holds([p], lr=0.1))
    opt.state[p]["lock"] = threading.Lock()
    assert opt.step(lambda: 2.0) == 2.0
    assert opt.applied_steps == 1 and p.tolist() == pytest.approx([0.9, 0.9])


def test_an_error_in_a_first_step_with_a_closure_is_raised_unchanged():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("expected all tensors to be on the same device")

    opt = GuardedOptimizer(Fails([one_parameter()], lr=0.1))
    with pytest.raises(RuntimeError, match="same device"):
        opt.step(lambda: torch.tensor(1.0))
    assert type(opt._stepper) is ReadFirst


def test_a_step_with_a_closure_that_returns_nothing_can_be_undone():
    closure = Evaluations("SAM")
    opt = GuardedOptimizer(closure.inner)

    def silent():
        closure()

    closure()
    opt.step(silent)
    closure.bad = True
    before = everything(closure.inner)
    closure()
    opt.step(silent)
    assert_same_bits(everything(closure.inner), before)
    assert (opt.applied_steps, opt.skipped_steps) == (1, 1)
