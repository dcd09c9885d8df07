"""Optimizers with their own state dict format: wrappers and containers of optimizers."""

import copy
from collections import OrderedDict
from itertools import chain

import pytest
import torch

from fastguard import CheckpointStore, GuardedOptimizer, Rollback
from fastguard.guard import lifetime
from guardtest.guarded import parameters_of
from guardtest.training import assert_same_bits, give_gradients, new_parameters, poison


class Lookahead(torch.optim.Optimizer):
    """Shares the param groups of its base, and saves only its base."""

    def __init__(self, base):
        self.base, self.defaults, self.state = base, base.defaults, {}
        self.param_groups = base.param_groups
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), {}

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step(closure)
        for p in parameters_of(self):
            state = self.base.state[p]
            slow = state.setdefault("slow", p.clone())
            p.copy_(slow.lerp_(p, 0.5))

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups


class Nested(Lookahead):
    """Saves its base under a separate key, and its own state by position."""

    @property
    def param_groups(self):
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups):
        assert groups is self.base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step(closure)
        for i, p in enumerate(parameters_of(self)):
            self.state[(0, i)] = self.state.get((0, i), p.clone()).lerp(p, 0.5)
            p.copy_(self.state[(0, i)])

    def state_dict(self):
        return {"slow": dict(self.state), "base": self.base.state_dict()}

    def load_state_dict(self, state_dict):
        self.state = dict(state_dict["slow"])
        self.base.load_state_dict(state_dict["base"])


class Several(torch.optim.Optimizer):
    """One optimizer for matrices and one for the rest; saves a list."""

    def __init__(self, parts):
        self.parts = parts
        super().__init__(chain.from_iterable(map(parameters_of, parts)), {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state_dict):
        for part, state in zip(self.parts, state_dict, strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class SeveralByName(Several):
    """Like `Several`, but saves a dict with the keys that the guard uses."""

    def state_dict(self):
        return {"fastguard": super().state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["fastguard"])


class PrunedSettings(torch.optim.Adam):
    """Omits settings in its state dict, and adds them when loading."""

    def state_dict(self):
        saved = super().state_dict()
        return {
            **saved,
            "param_groups": [{"params": g["params"], "lr": g["lr"]} for g in saved["param_groups"]],
        }

    def load_state_dict(self, state_dict):
        groups = [
            {**own, **given}
            for own, given in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        super().load_state_dict({**state_dict, "param_groups": groups})


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def two_parts(parameters):
    matrices = [p for p in parameters if p.dim() > 1]
    return [adam(matrices), torch.optim.SGD(set(parameters) - set(matrices), lr=0.1, momentum=0.9)]


KINDS = {
    "lookahead": lambda ps: Lookahead(adam(ps)),
    "nested": lambda ps: Nested(adam(ps)),
    "several": lambda ps: Several([adam(ps[:2]), torch.optim.SGD(ps[2:], lr=0.1, momentum=0.9)]),
    "several by name": lambda ps: SeveralByName([adam(ps[:2]), adam(ps[2:])]),
    "around a guard": lambda ps: Lookahead(GuardedOptimizer(adam(ps), max_norm=0.5)),
    "pruned settings": lambda ps: PrunedSettings(ps, lr=0.1),
}


def without_lifetime(saved):
    """Returns the state of an inner guard without `lifetime`, which rollbacks do not restore."""
    if isinstance(saved, dict):
        return {k: without_lifetime(v) for k, v in saved.items() if k != lifetime.KEY}
    return saved


def everything(opt):
    """Returns the weights, and the state dict of the wrapped optimizer."""
    inner = opt.optimizer if isinstance(opt, GuardedOptimizer) else opt
    saved = without_lifetime(copy.deepcopy(inner.state_dict()))
    return {"saved": saved, "weights": [p.detach().clone() for p in parameters_of(inner)]}


def train(opt, steps):
    for step in steps:
        give_gradients(parameters_of(opt), step)
        opt.step()
    return opt


def made(kind, guarded=True):
    inner = KINDS[kind](new_parameters())
    return GuardedOptimizer(inner) if guarded else inner


def resumed(kind, opt):
    """Returns a new optimizer with the weights and the state of `opt`."""
    other = made(kind, isinstance(opt, GuardedOptimizer))
    with torch.no_grad():
        for p, q in zip(parameters_of(other), parameters_of(opt), strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_resumes_as_the_bare_optimizer_does(kind):
    guard, bare = train(made(kind), range(3)), train(made(kind, guarded=False), range(3))
    guard, bare = train(resumed(kind, guard), range(3, 5)), train(resumed(kind, bare), range(3, 5))
    assert_same_bits(everything(guard), everything(bare))
    assert (guard.steps_taken, guard.applied_steps) == (5, 5)
    assert_same_bits(everything(train(made(kind), range(5))), everything(bare))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"several by name", "around a guard"}))
def test_the_state_of_the_bare_optimizer_loads_into_a_new_guard(kind):
    bare = train(made(kind, guarded=False), range(3))
    guard = made(kind)
    saved = bare.state_dict()
    if isinstance(saved, list):
        with pytest.raises(TypeError, match=r"the result of opt\.state_dict\(\)"):
            guard.load_state_dict(saved)
        return
    with pytest.warns(UserWarning, match="the guard starts with counters at 0"):
        guard.load_state_dict(saved)
    assert_same_bits(everything(guard)["saved"], everything(bare)["saved"])


@pytest.mark.parametrize("kind", KINDS)
def test_rollback_restores_the_state(kind):
    opt = made(kind)
    weights = torch.nn.ParameterList(parameters_of(opt))
    rollback = Rollback(opt, {"weights": weights}, every=2, after_skips=1)
    for step in range(2):
        train(opt, [step])
        rollback.step(step)
    before = everything(opt)
    train(opt, [2])
    rollback.step(2)
    give_gradients(parameters_of(opt), 3)
    poison(parameters_of(opt))
    opt.step()
    assert rollback.step(3).step == 2
    assert_same_bits(everything(opt), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_store_keeps_the_state(kind, tmp_path):
    opt = train(made(kind), range(2))
    before = everything(opt)["saved"]
    store = CheckpointStore(tmp_path)
    store.save({"optimizer": opt}, step=2)
    other = made(kind)
    store.load("last-clean", {"optimizer": other})
    assert_same_bits({"": everything(other)["saved"]}, {"": before})
    assert other.steps_taken == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_cannot_be_loaded_changes_nothing(kind):
    """In a container of two optimizers, the first has loaded when the second fails."""
    opt = train(made(kind), range(2))
    saved = copy.deepcopy(opt.state_dict())
    train(opt, [2])
    before = everything(opt)
    broken = saved.get("wrapped", saved)
    broken = broken.get("fastguard", broken) if kind == "several by name" else broken
    if isinstance(broken, list):
        del broken[1]["param_groups"][0]["params"]
    else:
        del broken["base" if "base" in broken else "param_groups"]
    with pytest.raises(ValueError, match=r"cannot load this state dict|lacks 'param_groups'"):
        opt.load_state_dict(saved)
    assert_same_bits(everything(opt), before)
    assert opt.steps_taken == 3
    train(opt, [3])
    assert_same_bits(everything(opt), everything(train(made(kind), range(4))))


def test_a_state_with_settings_that_cannot_be_guarded_changes_nothing():
    opt = train(made("nested"), range(2))
    saved = copy.deepcopy(opt.state_dict())
    saved["base"]["param_groups"][0]["max_norm"] = 1.0
    train(opt, [2])
    before = everything(opt)
    with pytest.raises(ValueError, match=r"clip_scope='group'"):
        opt.load_state_dict(saved)
    assert_same_bits(everything(opt), before)


def test_loading_does_not_change_the_state_dict():
    class EmptiesIt(torch.optim.Adam):  # ZeroRedundancyOptimizer does so with states of other ranks
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            state_dict["state"].clear()

    opt = train(GuardedOptimizer(EmptiesIt(new_parameters())), range(2))
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert len(saved["state"]) == len(parameters_of(opt))


def test_an_optimizer_that_cannot_save_is_refused_by_rollback_with_the_reason():
    class NeverInitialized(torch.optim.Optimizer):
        def __init__(self, base):
            self.base, self.param_groups, self.state = base, base.param_groups, base.state
            self.defaults = base.defaults

        def step(self, closure=None):
            self.base.step()

    opt = GuardedOptimizer(NeverInitialized(adam(new_parameters())))
    train(opt, range(2))
    with pytest.raises(ValueError, match=r"'optimizer'.* NeverInitialized.*_state_dict_pre_hooks"):
        Rollback(opt, {})


def test_an_incomplete_optimizer_is_refused_by_name():
    class WithoutGroups(torch.optim.Optimizer):
        def __init__(self, base):
            self.base = base

    with pytest.raises(TypeError, match="WithoutGroups has no param_groups"):
        GuardedOptimizer(WithoutGroups(adam(new_parameters())))
