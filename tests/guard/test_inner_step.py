"""Calling the wrapped optimizer's `step`: arguments, result, closure, learning rate."""

import functools
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from fastguard import GuardedOptimizer, NonFiniteGradError

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
    """An optimizer whose first argument is not a closure, as for Gaussian splats."""

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
    """The signature of a function after a decorator without `functools.wraps`."""

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
    ):  # the first call finds out how step uses its closure
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


class Callback(torch.optim.SGD):
    def step(self, callback_fn=None, closure=None):
        super().step(closure)
        return callback_fn() if callback_fn else None


class LossFunction(torch.optim.SGD):
    """Computes gradients itself."""

    def step(self, loss_fn, x):
        self.zero_grad()
        with torch.enable_grad():
            loss = loss_fn(self.param_groups[0]["params"][0] * x)
        loss.backward()
        super().step()
        return loss.item()


def test_a_function_that_is_not_the_closure_is_passed_on():
    opt = GuardedOptimizer(Callback([one_parameter()], lr=0.1))
    assert opt.step(lambda: "called") == "called"
    assert opt.step(callback_fn=lambda: "called", closure=lambda: 3.0) == "called"
    assert opt.step(lambda: "called", lambda: 4.0) == "called"
    assert [r.losses for r in opt.records()] == [{}, {"loss": 3.0}, {"loss": 4.0}]
    p = one_parameter()
    opt = GuardedOptimizer(LossFunction([p], lr=0.1))
    for loss_fn, x in ((torch.sum, 1.0), (lambda y: y.sum(), NAN)):
        before = p.tolist()
        opt.step(loss_fn, x)
        assert (p.tolist() == before) == math.isnan(x)
    assert (opt.applied_steps, opt.skipped_steps) == (1, 1)
    assert opt.step(x=2.0, loss_fn=lambda y: y.sum()) == pytest.approx(3.6)


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


@pytest.mark.parametrize("kind", ["own step", "own step with closure", "hooked"])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("flat", [False, True])
def test_a_step_computes_gradients_if_its_caller_does(kind, enabled, flat):
    modes = []

    class Modes(torch.optim.SGD):
        def step(self, closure=None):
            if closure is not None:
                self.zero_grad()
                closure()
            modes.append(torch.is_grad_enabled())
            return super().step()

    p = one_parameter()
    inner = torch.optim.SGD([p], lr=0.1) if kind == "hooked" else Modes([p], lr=0.1)
    if kind == "hooked":
        inner.register_step_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    opt = GuardedOptimizer(inner, flat_buckets=flat)

    def closure():
        with torch.enable_grad():
            p.square().sum().backward()

    with torch.set_grad_enabled(enabled):
        for _ in range(2):
            opt.step(*[closure] * kind.endswith("closure"))
        assert torch.is_grad_enabled() == enabled
    assert set(modes) == {enabled}


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


# A step without torch's own profiler range.


@pytest.mark.parametrize("of", ["class", "instance"])
def test_a_step_that_other_code_has_replaced_is_called(monkeypatch, of):
    p, calls = one_parameter(), []
    inner = torch.optim.SGD([p], lr=0.1)
    owner = type(inner) if of == "class" else inner
    replaced = owner.step

    @functools.wraps(replaced)  # copies the attributes with which torch marks its own wrapper
    def step(*args, **kwargs):
        calls.append(args[:1])
        return replaced(*args, **kwargs)

    monkeypatch.setattr(owner, "step", step)
    GuardedOptimizer(inner).step()
    assert calls == [(inner,) if of == "class" else ()]
    assert p.tolist() == pytest.approx([0.9, 0.9])


def test_torchs_step_leaves_out_a_range_that_no_profiler_sees(monkeypatch):
    ranges = []

    def range_of(name):
        ranges.append(name)
        return nullcontext()

    monkeypatch.setattr(torch.autograd.profiler, "record_function", range_of)
    p = one_parameter()
    inner = torch.optim.SGD([p], lr=0.1)
    opt = GuardedOptimizer(inner)
    opt.step()
    assert not ranges and p.tolist() == pytest.approx([0.9, 0.9])
    handle = inner.register_step_post_hook(lambda *_: None)
    opt.step()
    handle.remove()
    assert ranges == ["Optimizer.step#SGD.step"]
