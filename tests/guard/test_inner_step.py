"""Calling the wrapped optimizer's `step`: arguments, result, closure, learning rate."""

import math
import threading
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from fastguard import GuardedOptimizer, NonFiniteGradError
from fastguard.guard.on_device import OnDevice
from fastguard.guard.read_first import ReadFirst
from fastguard.guard.whole_step import WholeStep
from guardtest.training import assert_same_bits, give_gradients, new_parameters, poison, snapshot

NAN = float("nan")


def one_parameter():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return p


# Arguments and return value.


class Extra(torch.optim.SGD):
    def step(self, closure=None, *args, metrics=None, **rest):
        result = ("stepped", closure, args, metrics, rest)
        super().step()
        return result


class Visible(torch.optim.SGD):
    """As in optimizers of Gaussian splats, the first argument is not a closure."""

    def step(self, visibility, n=None):
        self.seen = visibility, n
        super().step()


class WithLoss(torch.optim.SGD):
    def step(self, closure=None, loss=None, tag=None):
        super().step()
        return loss, tag


def test_other_arguments_and_the_result_of_step_are_passed_on():
    opt = GuardedOptimizer(Extra([one_parameter()], lr=0.1))
    assert opt.step() == ("stepped", None, (), None, {})
    assert opt.step(metrics=3, more=4) == ("stepped", None, (), 3, {"more": 4})
    assert opt.step(None, 5, tag="mine") == ("stepped", None, (5,), None, {})
    name, closure, *rest = opt.step(lambda: torch.tensor(7.0), metrics=1)
    assert (name, callable(closure), rest) == ("stepped", True, [(), 1, {}])
    assert [r.losses for r in opt.records()] == [{}, {}, {}, {"loss": 7.0}]


def test_a_first_argument_that_is_not_a_closure_is_passed_on():
    opt = GuardedOptimizer(Visible([one_parameter()], lr=0.1))
    mask = torch.tensor([True, False])
    opt.step(mask)
    assert opt.optimizer.seen == (mask, None)
    opt.step(mask, 2)
    assert opt.optimizer.seen == (mask, 2)
    opt.step(visibility=mask, n=3)
    assert opt.optimizer.seen == (mask, 3)
    assert opt.applied_steps == 3


class ClosureSecond(torch.optim.SGD):
    def step(self, batch_size, closure=None):
        return batch_size, super().step(closure)


class ClosureByName(torch.optim.SGD):
    def step(self, *, closure=None):
        return None, super().step(closure)


class ClosureUnnamed(torch.optim.SGD):
    """A signature as left by a decorator without `functools.wraps`."""

    def step(self, *args, **kwargs):
        return args[1:], super().step(*args, **kwargs)


class ClosureAmongOthers(torch.optim.SGD):
    def step(self, **settings):
        return None, super().step(settings.get("closure"))


class ClosureOfAnyName(torch.optim.SGD):
    def step(self, evaluate):
        return None, super().step(evaluate)


class ClosureOfAnyNameSecond(torch.optim.SGD):
    def step(self, batch_size, objective=None):
        return batch_size, super().step(objective)


@pytest.mark.parametrize(
    ("kind", "first", "call"),
    [
        (ClosureOfAnyName, None, lambda opt, c: opt.step(c)),
        (ClosureOfAnyName, None, lambda opt, c: opt.step(evaluate=c)),
        (ClosureOfAnyNameSecond, 8, lambda opt, c: opt.step(8, c)),
        (ClosureOfAnyNameSecond, 8, lambda opt, c: opt.step(8, objective=c)),
        (ClosureOfAnyNameSecond, 8, lambda opt, c: opt.step(objective=c, batch_size=8)),
        (ClosureAmongOthers, None, lambda opt, c: opt.step(closure=partial(c))),
        (ClosureSecond, 8, lambda opt, c: opt.step(8, c)),
        (ClosureSecond, 8, lambda opt, c: opt.step(8, closure=c)),
        (ClosureSecond, 8, lambda opt, c: opt.step(batch_size=8, closure=c)),
        (ClosureByName, None, lambda opt, c: opt.step(closure=c)),
        (ClosureUnnamed, (), lambda opt, c: opt.step(c)),
        (ClosureUnnamed, (), lambda opt, c: opt.step(closure=c)),
        (ClosureAmongOthers, None, lambda opt, c: opt.step(closure=c)),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_closure_is_found_and_guarded_wherever_step_takes_it(kind, first, call):
    p = torch.nn.Parameter(torch.ones(2))
    opt = GuardedOptimizer(kind([p], lr=0.1), max_norm=1.0)

    def closure(slope):
        p.grad = torch.full((2,), slope)
        return p.sum()

    for slope in (
        3.0,
        math.nan,
        4.0,
    ):  # the first to find out how step uses its closure
        result = call(opt, lambda slope=slope: closure(slope))
        if math.isnan(slope):
            assert torch.equal(result, 2.0 - torch.tensor(0.1 * 2**0.5))
        else:
            assert result[0] == first and isinstance(result[1], torch.Tensor)
    records = opt.records()
    assert [r.action for r in records] == ["clipped", "skipped", "clipped"]
    assert [len(r.losses) for r in records] == [1, 1, 1]
    torch.testing.assert_close(p.detach(), torch.full((2,), 1.0 - 0.2 / 2**0.5))


@pytest.mark.parametrize(
    "given",
    [torch.nn.Linear(1, 1), float, len, lambda loss: 1 / 0],
    ids=["module", "class", "built-in", "function"],
)
def test_a_callable_that_needs_arguments_is_not_a_closure(given):
    opt = GuardedOptimizer(Visible([one_parameter()], lr=0.1))
    opt.step(given)
    opt.step(visibility=given)
    assert opt.optimizer.seen == (given, None) and opt.applied_steps == 2


class Required(torch.optim.SGD):
    def step(self, closure):
        assert closure is None
        return super().step()


class RequiredByName(torch.optim.SGD):
    def step(self, *, fn):
        assert fn is None
        return super().step()


class RequiredSecond(torch.optim.SGD):
    def step(self, batch_size, closure):
        assert (batch_size, closure) == (8, None)
        return super().step()


class TakesNone(torch.optim.SGD):
    def step(self):
        return super().step()


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (Required, lambda opt: opt.step(None)),
        (Required, lambda opt: opt.step(closure=None)),
        (RequiredByName, lambda opt: opt.step(closure=None)),
        (RequiredByName, lambda opt: opt.step(fn=None)),
        (RequiredSecond, lambda opt: opt.step(8, None)),
        (RequiredSecond, lambda opt: opt.step(8, closure=None)),
        (ClosureUnnamed, lambda opt: opt.step(None)),
        (TakesNone, lambda opt: opt.step(None)),
        (TakesNone, lambda opt: opt.step(closure=None)),
    ],
)
def test_none_is_passed_on_if_step_requires_a_closure_argument(kind, call):
    opt = GuardedOptimizer(kind([one_parameter()], lr=0.1))
    call(opt)
    assert opt.applied_steps == 1 and opt.optimizer.param_groups[0]["params"][0][0] < 1


def test_unknown_arguments_are_passed_on():
    class Opaque(torch.optim.SGD):
        def step(self, *args):
            return args

    opt = GuardedOptimizer(Opaque([one_parameter()], lr=0.1))
    assert opt.step("mask", 3) == ("mask", 3)


def test_arguments_with_names_of_the_guard_reach_both():
    opt = GuardedOptimizer(WithLoss([one_parameter()], lr=0.1))
    assert opt.step(loss=2.0, tag="a") == (2.0, "a")
    (record,) = opt.records()
    assert record.losses == {"loss": 2.0} and record.tag == "a"


def test_a_skipped_step_returns_the_result_of_the_closure():
    p = one_parameter()
    opt = GuardedOptimizer(Extra([p], lr=0.1))

    def closure():
        p.grad = torch.tensor([NAN, 1.0])
        return 4.0

    assert opt.step(closure) == 4.0
    assert opt.step() is None
    assert opt.skipped_steps == 2


def test_an_argument_that_the_optimizer_does_not_take_changes_nothing():
    opt = GuardedOptimizer(torch.optim.SGD([one_parameter()], lr=0.1))
    with pytest.raises(TypeError, match="metrics"):
        opt.step(metrics=1)
    assert opt.steps_taken == opt.applied_steps == 0 and not opt.records()
    opt.step()
    assert [r.step for r in opt.records()] == [1]


# The learning rate in the record.


class OwnRate(torch.optim.Optimizer):
    def __init__(self, parameters, **defaults):
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.1 * p.grad


class Unreadable:
    def __float__(self):
        raise ZeroDivisionError


NO_RATES = {
    "unreadable": Unreadable(),
    "none": None,
    "word": "1e-3",
    "bytes": bytearray(b"1"),
    "flag": True,
    "function": lambda step: 0.1,
    "pair": (0.1, 0.2),
    "complex": 1j,
    "rows": torch.tensor([0.1, 0.2]),
    "huge": 10**400,
}
RATES = {
    "float": 0.25,
    "tensor": torch.tensor(0.25),
    "integer": 2,
    "numpy": np.float32(0.25),
    "fraction": Fraction(1, 4),
    "of one": torch.tensor([0.25]),
}


@pytest.mark.parametrize("lr", NO_RATES.values(), ids=NO_RATES)
def test_a_learning_rate_that_is_not_a_number_is_nan_in_the_record(lr):
    p = one_parameter()
    opt = GuardedOptimizer(OwnRate([p], lr=lr))
    opt.step()
    p.grad = torch.tensor([NAN, 1.0])
    opt.step()
    good, bad = opt.records()
    assert math.isnan(good.lr) and math.isnan(bad.lr)
    assert (opt.applied_steps, opt.skipped_steps) == (1, 1)
    assert p.tolist() == pytest.approx([0.9, 0.9])
    assert "lr nan" in str(bad)


@pytest.mark.parametrize("lr", RATES.values(), ids=RATES)
def test_a_learning_rate_that_is_a_number_of_any_kind(lr):
    opt = GuardedOptimizer(OwnRate([one_parameter()], lr=lr))
    opt.step()
    assert opt.records()[0].lr == float(lr)


def test_an_optimizer_without_param_groups():
    opt = GuardedOptimizer(torch.optim.SGD([one_parameter()], lr=0.1))
    del opt.param_groups[0]
    opt.step()
    assert math.isnan(opt.records()[0].lr)


# Changes of settings that select the stepper.


def guarded_adamw(**options):
    parameters = new_parameters()
    return parameters, GuardedOptimizer(torch.optim.AdamW(parameters, lr=0.1, **options))


def steps(parameters, opt, numbers, bad=()):
    for i in numbers:
        give_gradients(parameters, i)
        if i in bad:
            poison(parameters)
        before = snapshot(opt)
        opt.step()
        if i in bad:
            assert_same_bits(snapshot(opt), before)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("to", [{"fused": False}, {"fused": None, "foreach": True},
                                {"foreach": True}], ids=str)  # fmt: skip
def test_fused_set_to_false_after_construction(cls, to):
    parameters = new_parameters()
    opt = GuardedOptimizer(cls(parameters, lr=0.1, fused=True))
    steps(parameters, opt, range(3), bad={1})
    opt.param_groups[0].update(to)
    steps(parameters, opt, range(3, 6), bad={4})
    assert type(opt._stepper) is ReadFirst
    assert (opt.applied_steps, opt.skipped_steps) == (4, 2)


def test_fused_in_one_of_two_groups_and_back():
    parameters = new_parameters()
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    opt = GuardedOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True))
    steps(parameters, opt, range(2))
    opt.param_groups[1]["fused"] = False
    assert "after reading the verdict" in opt.describe()  # already before the next step
    steps(parameters, opt, range(2, 5), bad={3})
    assert type(opt._stepper) is ReadFirst
    opt.param_groups[1]["fused"] = True
    steps(parameters, opt, range(5, 8), bad={6})
    assert type(opt._stepper) is OnDevice
    assert (opt.applied_steps, opt.skipped_steps) == (6, 2)


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_dict_loaded_into_the_wrapped_optimizer_selects_the_stepper(fused):
    parameters, opt = guarded_adamw(fused=fused)
    others, other = guarded_adamw(fused=not fused)
    steps(others, other, range(2))
    opt.optimizer.load_state_dict(other.optimizer.state_dict())
    steps(parameters, opt, range(2, 5), bad={3})
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)
    # torch supports found_inf only if `fused` was passed to the constructor
    assert type(opt._stepper) is ReadFirst


# A parameter replaced in its group.


@pytest.mark.parametrize("alone", [True, False], ids=["own group", "shared group"])
@pytest.mark.parametrize("how", ["exchanged", "state cleared", "state loaded twice"])
def test_a_removed_momentum_buffer_is_not_left_uninitialized_by_a_skip(how, alone):
    def run(bad):
        a, b, c = new_parameters([(64,), (64,), (64,)])
        groups = [{"params": [a]}, {"params": [b]}] if alone else [{"params": [a, b]}]
        opt = GuardedOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True))
        steps([a, b], opt, range(2))
        live = [a, b]
        if how == "exchanged":
            opt.param_groups[-1]["params"][-1] = c
            live = [a, c]
            if not alone:  # torch itself cannot mix first and later steps
                opt.param_groups[0]["params"][0] = new_parameters([(64,)])[0]
                live[0] = opt.param_groups[0]["params"][0]
        elif how == "state cleared":
            for p in live[-1:] if alone else live:
                opt.state[p].clear()
        else:
            for _ in range(2):  # the second state may have the address of the first
                saved = opt.optimizer.state_dict()
                for state in saved["state"].values():
                    state["momentum_buffer"] = None
                opt.optimizer.load_state_dict(saved)
        if bad:
            junk = [torch.full((64,), 7e7) for _ in range(50)]
            del junk
            steps(live, opt, [2], bad={2})
        steps(live, opt, range(3, 5))
        return {k: v for k, v in snapshot(opt).items() if v is not None}

    assert_same_bits(run(True), run(False))


def test_a_step_with_a_loaded_state_that_lacks_a_buffer_can_be_skipped():
    """torch cannot step with such a state, but skipping must work."""
    parameters = new_parameters([(8,), (8,)])
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True))
    steps(parameters, opt, range(2))
    saved = opt.optimizer.state_dict()
    saved["state"][1]["momentum_buffer"] = None
    opt.optimizer.load_state_dict(saved)
    steps(parameters, opt, [2], bad={2})
    assert opt.skipped_steps == 1


# Optimizers that need their closure.


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
    """The step size is the loss divided by the squared norm of the gradient."""

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
    """Evaluates at a point other than the weights, and counts in its param group."""

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
    """SAM whose ascent changes `p.data`, which no version counter shows; it keeps gradients."""

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
    """Like `Clears`, with an optimizer per parameter, in a list."""

    def __init__(self, ps):
        super().__init__(ps, lr=0.1)
        self.bases = [torch.optim.Adam([p], lr=0.1) for p in ps]

    def step(self, closure):
        loss = super().step(closure)
        for base in self.bases:
            base.step()
        return loss


class LineSearch(torch.optim.Optimizer):
    """Halves the rate until the loss falls, which it evaluates without a backward pass."""

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
    """The step depends on the loss, if there is one."""

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


def test_a_weight_that_is_nan_all_along_was_not_changed_before_the_closure():
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
        first = True

        def step(self, closure=None):
            if self.first:
                closure()
            super().step()
            if not self.first:
                closure()
            self.first = False

    opt = GuardedOptimizer(Later([one_parameter()], lr=0.1))
    opt.step(lambda: torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"Later.step evaluates its closure.*cannot guard"):
        opt.step(lambda: torch.tensor(1.0))
    assert opt.steps_taken == opt.applied_steps == len(opt.records()) == 1


def test_a_state_that_cannot_be_copied_does_not_prevent_a_closure():
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


def test_an_error_in_a_first_step_with_a_closure_is_raised_as_it_is():
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


# An exception in the wrapped step.


class Fragile(torch.optim.SGD):
    error = None

    def step(self, closure=None):
        if self.error is not None:
            raise self.error
        super().step()


ERRORS = [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt(), TypeError("more arguments")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_step_that_raises_does_not_count(error):
    p = one_parameter()
    opt = GuardedOptimizer(Fragile([p], lr=0.1))
    inbox, told = opt.subscribe(), []
    opt.add_sink(told.append)
    opt.step(tag=0)
    opt.optimizer.error = error
    with pytest.raises(type(error)):
        opt.step(tag=1, loss=1.0)
    opt.optimizer.error = None
    opt.step(tag=2, loss=3.0)
    assert opt.steps_taken == opt.applied_steps == 2
    for seen in (opt.records(), list(inbox), told):
        assert [(r.step, r.tag) for r in seen] == [(1, 0), (2, 2)]
    assert told[-1].losses == {"loss": 3.0}
    assert p.tolist() == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize("again", ["tried again", "another batch"])
def test_losses_observed_before_a_step_that_raises(again):
    opt = GuardedOptimizer(Fragile([one_parameter()], lr=0.1))
    opt.observe(2.0)
    opt.observe(4.0)
    opt.optimizer.error = MemoryError()
    with pytest.raises(MemoryError):
        opt.step()
    opt.optimizer.error = None
    if again == "another batch":
        opt.observe(9.0)
    opt.step()
    assert opt.records()[0].losses == {"loss": 3.0 if again == "tried again" else 9.0}


def test_a_loss_that_the_guard_refused_is_not_used_again():
    opt = GuardedOptimizer(torch.optim.SGD([one_parameter()], lr=0.1), nonfinite="raise")
    opt.observe(NAN)
    with pytest.raises(NonFiniteGradError):
        opt.step()
    opt.step()
    assert opt.applied_steps == 1
