"""Optimizers that are not torch's: some can be traced, others are refused with a reason."""

import math

import pytest
import torch
from torch.optim import Optimizer

from fastguard import GuardedOptimizer
from guardtest.compiled import MATRICES, assert_same_bits, compiled, give, parameters, tensors_of
from guardtest.tolerances import COMPILED_RTOL

NAN = float("nan")


class Own(Optimizer):
    """The structure of most third-party optimizers."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "decay": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p, p.grad, self.state[p])

    def begin(self, group):
        pass


class Lion(Own):
    def update(self, group, p, grad, state):
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        p.data.mul_(1 - group["lr"] * group["decay"])
        step = state["exp_avg"].clone().mul_(beta1).add(grad, alpha=1 - beta1).sign_()
        p.add_(step, alpha=-group["lr"])
        state["exp_avg"].mul_(beta2).add_(grad, alpha=1 - beta2)


class CountsInTheState(Own):
    def update(self, group, p, grad, state):
        if not state:
            state["step"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["m"] = state["m"] * beta1 + grad * (1 - beta1)
        state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = math.sqrt(1 - math.pow(beta2, state["step"])) / (1 - beta1 ** state["step"])
        p.addcdiv_(state["m"], state["v"].sqrt() + 1e-8, value=-group["lr"] * correction)


class CountsInTheGroup(Own):
    def begin(self, group):
        group["step"] = group.get("step", 0) + 1
        group["most"] = max(group.get("most", 0.0), group["lr"] / group["step"])

    def update(self, group, p, grad, state):
        p.sub_(grad, alpha=group["most"] / math.sqrt(group["step"]))


@pytest.mark.parametrize("kind", [Lion, CountsInTheState, CountsInTheGroup])
def test_an_optimizer_is_supported(kind):
    params, others = parameters(), parameters()
    opt = compiled(kind(params))
    plain = GuardedOptimizer(kind(others), max_norm=1.0)
    for seed, value in enumerate((NAN, None, NAN, None, None, NAN, NAN, None)):
        for some, o in ((params, opt), (others, plain)):
            give(some, seed, value)
            before = tensors_of(o.optimizer)
            lr = 0.1 / (1 + seed)
            o.param_groups[0]["lr"] = lr
            o.step()
            after = tensors_of(o.optimizer)
            if value is not None and seed > 2:
                assert_same_bits(before, after)
    assert opt._stepper._n_compiled == 1
    assert opt.skipped_steps == plain.skipped_steps == 4
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=COMPILED_RTOL, atol=1e-6)


class HasAnAttribute(Own):
    def __init__(self, params):
        super().__init__(params)
        self.rate = 1.0

    def update(self, group, p, grad, state):
        p.sub_(grad, alpha=self.rate)


class Holder:
    def __init__(self):
        self.last = None


class NotesInAList(Own):
    def update(self, group, p, grad, state):
        state.setdefault("notes", [[0.0, None]])[0][1] = grad.norm()
        p.sub_(grad)


class NotesInAnObject(Own):
    def update(self, group, p, grad, state):
        state.setdefault("holder", Holder()).last = grad.norm()
        p.sub_(grad)


class NotesInASetting(Own):
    def __init__(self, params):
        super().__init__(params)
        self.param_groups[0]["buffer"] = [[None]]

    def update(self, group, p, grad, state):
        group["buffer"][0][0] = grad.norm()
        p.sub_(grad)


class NotesInItself(Own):
    def __init__(self, params):
        super().__init__(params)
        self.notes = {"last": [None]}

    def update(self, group, p, grad, state):
        self.notes["last"][0] = grad.norm()
        p.sub_(grad)


def notes_of(inner):
    found = []
    for p in inner.param_groups[0]["params"]:
        state = inner.state.get(p, {})
        found += [*state.get("notes", ()), *vars(state.get("holder", Holder())).values()]
    return [*found, inner.param_groups[0].get("buffer"), getattr(inner, "notes", None)]


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (NotesInAList, "the state 'notes'"),
        (NotesInAnObject, "the state 'holder'"),
        (NotesInASetting, "the setting 'buffer'"),
        (NotesInItself, "its attribute notes"),
    ],
)
def test_optimizers_that_store_python_values_are_refused_and_not_changed(kind, where):
    """A trace would store placeholders once, and the compiled update would store nothing."""
    params = parameters()
    inner = kind(params)
    opt = compiled(inner)
    give(params, 0)
    with pytest.raises(TypeError, match=f"step changes {where}"):
        for _ in range(3):  # the first steps create the state
            before = repr(notes_of(inner))
            opt.step()
    assert "Fake" not in before and repr(notes_of(inner)) == before


def test_an_attribute_changed_from_outside():
    params = parameters()
    opt = compiled(HasAnAttribute(params), max_norm=None)
    give(params, 0)
    opt.step()
    opt.optimizer.rate = 0.0
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(p.equal(q) for p, q in zip(params, before, strict=True))


class Waits(Own):
    def update(self, group, p, grad, state):
        if grad.norm() > 1.0:
            p.sub_(grad)


class CountsInItself(Own):
    n = 0

    def begin(self, group):
        self.n = self.n + 1

    def __init__(self, params):
        super().__init__(params)
        self.n = 0

    def update(self, group, p, grad, state):
        p.sub_(grad, alpha=1 / self.n)


class Swaps(Own):
    def update(self, group, p, grad, state):
        state.setdefault("kind", "first")
        p.sub_(grad)
        state["kind"] = "second" if state["kind"] == "first" else "first"


class HoldsATensor(Own):
    def __init__(self, params):
        super().__init__(params)
        self.total = torch.zeros(6, 5)

    def update(self, group, p, grad, state):
        self.total += grad
        p.sub_(self.total)


class DecaysATensor(HoldsATensor):
    """Uses an operation without placeholders, which a trace would run instead of recording."""

    def __init__(self, params):
        super().__init__(params)
        self.total += 1.0

    def update(self, group, p, grad, state):
        self.total.mul_(0.5)
        p.sub_(grad)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            Waits,
            r"test_other_optimizers.py:\d+, in update: if grad.norm\(\) > 1.0: \(the step reads",
        ),
        (CountsInItself, "changes its attribute n, a Python number"),
        (Swaps, "'kind'"),
        (
            DecaysATensor,
            r"test_other_optimizers.py:\d+, in update: self.total.mul_\(0.5\) \(the step uses",
        ),
        (HoldsATensor, r"test_other_optimizers.py:\d+, in update: self.total \+= grad"),
    ],
)
def test_the_refusal_names_the_line_that_cannot_be_traced(kind, told):
    params = parameters(MATRICES if not issubclass(kind, HoldsATensor) else ((6, 5),))
    inner = kind(params)
    opt = compiled(inner)
    give(params, 0)
    before, attributes = tensors_of(inner), {k: v for k, v in vars(inner).items() if k == "n"}
    with pytest.raises(TypeError, match=told) as error:
        for _ in range(8):  # steps that create state are not compiled
            opt.step()
            assert kind is Swaps
    assert "remove compile_step" in str(error.value)
    if kind is not Swaps:
        assert_same_bits(before, tensors_of(inner))
        assert opt.steps_taken == 0 and not inner.state
    assert {k: v for k, v in vars(inner).items() if k == "n"} == attributes
    if issubclass(kind, HoldsATensor):
        assert inner.total.eq(kind is DecaysATensor).all()


def test_refused_at_construction():
    params = parameters()
    with pytest.raises(
        TypeError, match="LBFGS, which evaluates a closure in the middle of its step"
    ):
        compiled(torch.optim.LBFGS(params))
    with pytest.raises(ValueError, match="pass one of them"):
        compiled(torch.optim.AdamW(params), flat_parameters=True)
    with pytest.raises(TypeError, match="is complex"):
        compiled(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=1))
    inner = torch.optim.SGD(params, lr=0.1)
    inner.step = lambda: None
    with pytest.raises(TypeError, match="was replaced on the instance"):
        compiled(inner)


class Wraps(Own):
    """Keeps settings and state in the optimizer that it wraps, like Lookahead."""

    def __init__(self, inner):
        self.inner = inner
        torch.optim.Optimizer.__init__(self, inner.param_groups, {})

    @property
    def param_groups(self):
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups):
        self.inner.param_groups = groups

    def step(self, closure=None):
        return self.inner.step(closure)


class Holds(Own):
    """Shares its param_groups with another optimizer."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self, closure=None):
        return self.inner.step(closure)


class Contains(Own):
    """Steps several optimizers, each with its own parameters."""

    def __init__(self, each):
        values = list(each.values()) if isinstance(each, dict) else list(each)
        super().__init__([g for o in values for g in o.param_groups], {})
        self.each = each

    def step(self, closure=None):
        for optimizer in self.each.values() if isinstance(self.each, dict) else self.each:
            optimizer.step()


def test_an_optimizer_that_wraps_others_is_refused():
    inner = torch.optim.AdamW(parameters())
    others = torch.optim.SGD(parameters()), torch.optim.AdamW(parameters())
    for optimizer in (
        Wraps(inner),
        Holds(inner),
        Contains(list(others)),
        Contains(others),
        Contains({"matrices": others[0], "vectors": others[1]}),
    ):
        name = type(optimizer).__name__
        with pytest.raises(TypeError, match=f"{name}, whose .* belong to other optimizers"):
            compiled(optimizer)
    assert type(inner.param_groups[0]) is dict


class Profiled(Lion):
    def update(self, group, p, grad, state):
        with torch.profiler.record_function("update"):
            super().update(group, p, grad, state)


def test_profiler_ranges_in_the_step_are_supported():
    test_an_optimizer_is_supported(Profiled)


def test_arguments_of_the_step_are_refused():
    class Takes(Lion):
        def step(self, closure=None, weight=None):
            super().step()

    params = parameters()
    opt = compiled(Takes(params))
    give(params, 0)
    with pytest.raises(TypeError, match=r"1 arguments for Takes\.step"):
        opt.step(None, 2.0)


def test_dampened_momentum_starts_with_torchs_first_step():
    params, others = parameters(), parameters()
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    opt = compiled(torch.optim.SGD(params, **options))
    plain = GuardedOptimizer(torch.optim.SGD(others, **options), max_norm=1.0)
    for seed, value in enumerate((NAN, None, NAN, None)):
        for some, o in ((params, opt), (others, plain)):
            give(some, seed, value)
            o.step()
    assert opt._stepper._n_compiled == 1
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=COMPILED_RTOL, atol=1e-6)


def test_gradients_that_appear_one_by_one_are_no_reason_to_refuse():
    params, others = (parameters([(3,)] * 6) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    opt = compiled(torch.optim.SGD(params, **options))
    plain = GuardedOptimizer(torch.optim.SGD(others, **options), max_norm=1.0)
    for n in range(1, 8):
        for some, o in ((params, opt), (others, plain)):
            give(some[:n], n)
            o.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=COMPILED_RTOL, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.Rprop])
def test_state_starts_from_the_learning_rate_of_the_first_applied_step(kind):
    params, others = parameters(), parameters()
    opt = compiled(kind(params, lr=0.5))
    plain = GuardedOptimizer(kind(others, lr=0.5), max_norm=1.0)
    for seed, value in enumerate((NAN, None, None)):
        for some, o in ((params, opt), (others, plain)):
            o.param_groups[0]["lr"] = 0.5 if seed == 0 else 0.01
            give(some, seed, value)
            o.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=COMPILED_RTOL, atol=1e-6)
