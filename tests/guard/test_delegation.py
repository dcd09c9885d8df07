"""The guard has the methods and attributes of the wrapped optimizer, and no others."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch

from fastguard import GuardedOptimizer
from guardtest.guarded import adamw, parameters_of, sgd
from guardtest.training import give_gradients, new_parameters


class ScheduleFree(torch.optim.SGD):
    """Uses other weights for evaluation, and has attributes that training loops check for."""

    is_second_order = True
    warmup_steps = 5
    training = True
    averaging = {"beta": 0.9}  # noqa: RUF012  (a class attribute: torch copies no others)

    def train(self, mode=True):
        self.training = mode
        return self

    def eval(self):
        return self.train(False)

    @property
    def myself(self):
        return self

    @classmethod
    def kind(cls):
        return cls

    @property
    def n_averaged(self):
        return len(self.param_groups)

    @property
    def broken(self):
        raise AttributeError("no momentum yet")


def guarded():
    return GuardedOptimizer(ScheduleFree(new_parameters(), lr=0.1))


def pickled(opt):
    return pickle.loads(pickle.dumps(opt))


@pytest.mark.parametrize("copied", [lambda opt: opt, copy.copy, copy.deepcopy, pickled])
def test_methods_and_attributes_are_delegated(copied):
    opt = copied(guarded())
    opt.eval()
    assert not opt.optimizer.training and opt.training is False
    opt.train()
    assert opt.optimizer.training
    assert opt.is_second_order and opt.n_averaged == 1
    assert opt.averaging is opt.optimizer.averaging
    assert {"train", "n_averaged", "averaging", "records"} <= set(dir(opt))


@pytest.mark.parametrize("copied", [lambda opt: opt, copy.copy, copy.deepcopy, pickled])
def test_methods_that_return_self_return_the_guard(copied):
    """Otherwise chained calls would continue on the unguarded optimizer."""
    opt = copied(guarded())
    assert opt.train() is opt.eval() is opt.train(mode=False) is opt
    assert opt.myself is opt and opt.optimizer.train() is opt.optimizer
    assert opt.kind() is ScheduleFree
    assert opt.train.__name__ == "train" and "mode" in inspect.signature(opt.train).parameters


@pytest.mark.parametrize("copied", [lambda opt: opt, copy.copy, copy.deepcopy, pickled])
def test_attributes_that_the_wrapped_optimizer_lacks_are_missing(copied):
    opt = copied(adamw())
    for name in ("train", "eval", "is_second_order", "sync_lookahead", "__array__", "__len__"):
        assert not hasattr(opt, name)
        assert getattr(opt, name, None) is None
    with pytest.raises(AttributeError, match=r"'GuardedOptimizer' nor .* 'AdamW'.* 'evaluate'"):
        opt.evaluate()
    with pytest.raises(AttributeError, match="has no attribute 'evaluate'"):
        del opt.evaluate
    assert "train" not in dir(opt)


def test_a_method_that_is_added_later_is_available():
    opt = sgd(new_parameters())
    assert not hasattr(opt, "sync_lookahead")
    opt.optimizer.sync_lookahead = lambda: "synced"
    assert opt.sync_lookahead() == "synced"
    del opt.optimizer.sync_lookahead
    assert not hasattr(opt, "sync_lookahead")


def test_attributes_of_the_wrapped_optimizer_are_set_and_deleted_there():
    opt = guarded()
    opt.warmup_steps = 7
    assert opt.optimizer.warmup_steps == 7 and "warmup_steps" not in vars(opt)
    del opt.warmup_steps
    assert opt.warmup_steps == 5
    opt.averaging = None
    assert opt.optimizer.averaging is None
    opt.defaults = {"lr": 1.0}
    assert opt.optimizer.defaults == {"lr": 1.0}


def test_other_attributes_are_set_on_the_guard():
    opt = guarded()
    opt.note = "mine"
    opt.max_norm = 2.0
    assert opt.note == "mine" and not hasattr(opt.optimizer, "note")
    assert not hasattr(opt.optimizer, "max_norm")
    del opt.note
    assert not hasattr(opt, "note")


def test_a_step_set_on_the_guard_remains_there():
    """Trainers and schedulers set it; it must not replace the step of the wrapped optimizer."""
    opt = guarded()
    inner = opt.optimizer.step
    opt.step = partial(opt.step, loss=float("nan"))
    give_gradients(parameters_of(opt), 0)
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.optimizer.step.__func__ is inner.__func__
    del opt.step
    opt.step()
    assert opt.applied_steps == 1


@pytest.mark.parametrize("name", ["last", "group", "rules", "max_norm"])
def test_attributes_of_the_guard_take_precedence(name):
    inner = ScheduleFree(new_parameters(), lr=0.1)
    setattr(inner, name, "of the wrapped one")
    opt = GuardedOptimizer(inner)
    give_gradients(parameters_of(opt), 0)
    opt.step()
    assert getattr(inner, name) == "of the wrapped one"
    assert getattr(opt, name) != "of the wrapped one"


def test_scaler_attributes_of_the_wrapped_optimizer_are_not_delegated():
    inner = torch.optim.RMSprop(new_parameters())
    inner.grad_scale, inner.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    opt = GuardedOptimizer(inner)
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
    give_gradients(parameters_of(opt), 0)
    opt.step()
    assert opt.applied_steps == 1


def test_a_failing_property_raises_its_own_error():
    opt = guarded()
    with pytest.raises(AttributeError, match="'broken'") as raised:
        _ = opt.broken
    assert str(raised.value.__cause__) == "no momentum yet"
    del opt._state
    with pytest.raises(AttributeError, match="'_state'"):
        _ = opt.applied_steps


def test_an_incomplete_copy_has_no_attributes_and_does_not_recurse():
    opt = GuardedOptimizer.__new__(GuardedOptimizer)
    for name in ("optimizer", "train", "_state", "__deepcopy__x__"):
        with pytest.raises(AttributeError):
            getattr(opt, name)
    opt.anything = 1
    assert opt.anything == 1


class AnswersAll(torch.optim.SGD):
    """Has a value for every attribute, even for those that the guard has not set yet."""

    def __getattr__(self, name):
        if name.startswith("__") or name in ("grad_scale", "found_inf"):  # torch looks for them
            raise AttributeError(name)
        return name


@pytest.mark.parametrize("copied", [lambda opt: opt, copy.copy, copy.deepcopy, pickled])
def test_attributes_of_the_wrapped_optimizer_are_never_taken_for_the_guards(copied):
    parameters = new_parameters()
    opt = copied(GuardedOptimizer(AnswersAll(parameters, lr=0.1), max_norm=1.0))
    assert opt.anything == "anything"
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.max_norm = 2.0
    opt.step()
    assert opt.applied_steps == 2 and len(opt.records()) == 2


class TwoCalls(torch.optim.SGD):
    """SAM with two methods in place of `step`, as in many training loops."""

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=0.05)

    def second_step(self):
        super().step()

    def next_step(self):
        return 1


def test_methods_that_bypass_the_guard_log_one_warning(caplog):
    parameters = new_parameters()
    opt = GuardedOptimizer(TwoCalls(parameters, lr=0.1))
    give_gradients(parameters, 0)
    caplog.clear()
    assert opt.next_step() == 1
    assert not caplog.records
    opt.first_step()
    opt.second_step()
    (record,) = caplog.records
    assert "TwoCalls.first_step changes the weights outside of step" in record.getMessage()


class Container(torch.optim.SGD):
    """A container of optimizers, which can also be called and entered."""

    entered = False

    def __len__(self):
        return len(self.param_groups)

    def __iter__(self):
        return iter(self.param_groups)

    def __getitem__(self, i):
        return self.param_groups[i]

    def __call__(self, x):
        return 2 * x

    def __enter__(self):
        self.entered = True
        return self

    def __exit__(self, *error):
        self.entered = False


@pytest.mark.parametrize("copied", [lambda opt: opt, copy.copy, copy.deepcopy, pickled])
def test_special_methods_are_delegated(copied):
    opt = copied(GuardedOptimizer(Container(new_parameters(), lr=0.1)))
    assert type(opt.optimizer) is Container and isinstance(opt, GuardedOptimizer)
    assert type(opt).__name__ == "GuardedOptimizer"
    assert (len(opt), list(opt), opt[0], opt(3)) == (1, opt.param_groups, opt.param_groups[0], 6)
    with opt as entered:
        assert entered is opt and opt.optimizer.entered
    assert not opt.optimizer.entered
    give_gradients(parameters_of(opt), 0)
    opt.step()
    assert opt.applied_steps == 1


def test_special_methods_that_the_wrapped_optimizer_lacks_are_missing():
    opt = adamw()
    assert not callable(opt) and not hasattr(opt, "__len__") and type(opt) is GuardedOptimizer


def test_special_methods_of_a_subclass_of_the_guard_take_precedence():
    class Two(GuardedOptimizer):
        def __len__(self):
            return 2

    opt = Two(Container(new_parameters(), lr=0.1))
    assert len(opt) == 2 and opt(1) == 2
