"""State that torch's `load_state_dict` cannot load or would change is restored as saved."""

import copy
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fastguard import GuardedOptimizer, Rollback


class Pair(NamedTuple):
    a: torch.Tensor
    n: int


ENTRIES = {
    "named tuple": lambda: Pair(torch.ones(2), 3),
    "array": lambda: np.ones(3),
    "storage": lambda: torch.ones(3).untyped_storage(),
    "text": lambda: "warm",
    "bounded deque": lambda: deque([torch.ones(2)], maxlen=2),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "nested": lambda: {"a": [Pair(torch.ones(1), 1)], "b": (np.ones(1), "x")},
}


class Holds(torch.optim.Optimizer):
    """Keeps one entry in the state of each parameter, and one entry in the state itself."""

    def __init__(self, parameters: Any, entry: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.entry = entry

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("held", self.entry())
            self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad)
            p.sub_(p.grad)
        self.state.setdefault("held", self.entry())


def guarded(entry: Any) -> tuple[torch.nn.Parameter, GuardedOptimizer]:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return p, GuardedOptimizer(Holds([p], entry))


def described(value: Any) -> str:
    return f"{type(value)} {value!r} {getattr(value, 'maxlen', None)}"


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_state_is_restored_as_it_was_saved(entry):
    p, opt = guarded(entry)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    q, other = guarded(entry)
    other.load_state_dict(saved)
    for loaded in (other.state[q]["held"], other.state["held"]):
        assert described(loaded) == described(entry())
    assert other.state[q]["held"] is not saved["state"][0]["held"] or entry() == "warm"
    assert other.state[q]["sum"].tolist() == opt.state[p]["sum"].tolist()
    other.step()
    assert other.applied_steps == 2


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_rollback_restores_the_state(entry):
    p, opt = guarded(entry)
    opt.step()
    rollback = Rollback(opt, {}, after_skips=1)
    p.grad = torch.full((2,), float("nan"))
    opt.step()
    assert rollback.step() is not None
    assert described(opt.state[p]["held"]) == described(entry())


def test_load_hooks_of_the_wrapped_optimizer_see_the_state():
    _, opt = guarded(ENTRIES["named tuple"])
    opt.step()
    q, other = guarded(ENTRIES["named tuple"])
    seen = []
    other.optimizer.register_load_state_dict_pre_hook(
        lambda _, loaded: seen.append(loaded["state"][0]["held"])
    )
    other.optimizer.register_load_state_dict_post_hook(
        lambda inner: seen.append(inner.state[q]["held"])
    )
    other.load_state_dict(opt.state_dict())
    assert [described(entry) for entry in seen] == [described(Pair(torch.ones(2), 3))] * 2
