"""Every optimizer of the popular packages, compared with and without a guard."""

import copy
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard import GuardedOptimizer, Rollback
from fastguard.gradients.tensor_parts import parts_of
from guardtest import require

PACKAGES = (
    "timm.optim",
    "torch_optimizer",
    "schedulefree",
    "pytorch_optimizer",
    "torchao.optim",
    "transformers.optimization",
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages

# These need more than `step()`, or other hardware.
LEFT_OUT = {
    "schedulefree.AdamWScheduleFreeClosure": "steps by its closure",
    "schedulefree.RAdamScheduleFreeClosure": "steps by its closure",
    "schedulefree.SGDScheduleFreeClosure": "steps by its closure",
    "pytorch_optimizer.AliG": "steps by its closure",
    "pytorch_optimizer.BSAM": "steps by its closure",
    "pytorch_optimizer.FriendlySAM": "steps by its closure",
    "pytorch_optimizer.GSAM": "steps by its closure",
    "pytorch_optimizer.LookSAM": "steps by its closure",
    "pytorch_optimizer.SAM": "steps by its closure",
    "pytorch_optimizer.WSAM": "steps by its closure",
    "pytorch_optimizer.AdaLOMO": "updates within backward",
    "pytorch_optimizer.LOMO": "updates within backward",
    "pytorch_optimizer.DeMo": "compresses gradients between ranks, with einops",
    "pytorch_optimizer.DistributedMuon": "gathers over a process group",
    "torchao.optim.CPUOffloadOptimizer": "asks for a GPU",
    "transformers.optimization.LayerWiseDummyOptimizer": "its step does nothing",
}
REFUSED = {"pytorch_optimizer.SafeFP16Optimizer": "has no param_groups"}
CANNOT_SAVE = {
    "torch_optimizer.Lookahead"
}  # it never calls Optimizer.__init__, which this torch needs
NEED_GRAPH = {
    "timm.optim.Adahessian",
    "torch_optimizer.Adahessian",
    "pytorch_optimizer.AdaHessian",
    "pytorch_optimizer.SophiaH",
}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Disables compilation, which takes seconds per optimizer."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Model(nn.Module):
    """Two layers, small enough for 200 optimizers. State is quantised from 4096 elements on."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(width, width)
        self.last = nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.wide(x)))


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


Maker = Callable[[type, nn.Module], Any]
MAKERS: tuple[Maker, ...] = (
    lambda cls, model: cls(model.parameters()),
    lambda cls, model: cls(model.parameters(), lr=1e-2),
    lambda cls, model: cls(adamw(model)),
    lambda cls, model: cls(muon_groups(model)),
    lambda cls, model: cls(model.parameters(), num_iterations=20),
    lambda cls, model: cls(model),
    lambda cls, model: cls([p for p in model.parameters() if p.dim() == 2]),
)


def optimizers() -> dict[str, type]:
    found: dict[str, type] = {}
    for package in PACKAGES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = require(package)
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer:
                if not f"{cls.__module__}.".startswith("torch."):
                    found.setdefault(f"{package}.{name}", cls)
    return found


OPTIMIZERS = optimizers()
DRIVEN = sorted(set(OPTIMIZERS) - set(LEFT_OUT) - set(REFUSED))


class Run:
    """A model and its optimizer, guarded or bare.

    Args:
        name: Name of the optimizer.
        guarded: Whether it is guarded.
        how: The entry of `MAKERS` that constructs it.
    """

    def __init__(self, name: str, guarded: bool, how: Maker) -> None:
        self.model = Model(width=64 if name.startswith("torchao") else 12)
        self.graph = name in NEED_GRAPH
        inner = how(OPTIMIZERS[name], self.model)
        self.opt = GuardedOptimizer(inner) if guarded else inner
        self.inner = inner
        if hasattr(self.opt, "train"):
            self.opt.train()

    def step(self, *steps: int, bad: bool = False) -> None:
        for step in steps:
            torch.manual_seed(step)  # some optimizers use random numbers
            x = torch.randn(8, self.model.wide.in_features)
            loss = self.model(x).square().mean()
            loss.backward(create_graph=self.graph)
            if bad:
                self.model.wide.weight.grad.data[0, 0] = float("nan")
            self.opt.step()
            self.opt.zero_grad()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def state(self) -> Any:
        return values(self.inner.state_dict())


def values(state: Any) -> Any:
    """A copy of a state in plain containers, which `==` can compare."""
    if isinstance(state, Tensor) and (parts := parts_of(state)) is not None:
        return values(dict(parts.tensors))
    if isinstance(state, Tensor):
        raw = state.detach().contiguous().view(-1).view(torch.uint8).tolist()
        return (str(state.dtype), tuple(state.shape), raw)
    if isinstance(state, dict):
        return {str(key): values(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [values(value) for value in state]
    return state if isinstance(state, int | float | str | bool) else type(state).__name__


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def maker_of(name: str) -> Maker:
    """The first entry of `MAKERS` whose optimizer can take two steps."""
    errors = []
    for how in MAKERS:
        try:
            Run(name, guarded=False, how=how).step(0, 1)
            return how
        except Exception as error:
            errors.append(repr(error))
    pytest.fail(f"none of MAKERS constructs {name}: {errors}")


def resumed(name: str, how: Maker, guarded: bool) -> tuple[list[Tensor], Any]:
    """Weights and state after three steps, a save, a load into a new run, and two more steps."""
    first, second = Run(name, guarded, how), Run(name, guarded, how)
    first.step(0, 1, 2)
    file = io.BytesIO()
    torch.save([first.opt.state_dict(), first.model.state_dict()], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=False)
    second.model.load_state_dict(weights)
    second.opt.load_state_dict(state)
    second.step(3, 4)
    return second.weights(), second.state()


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", DRIVEN)
def test_a_guarded_optimizer_matches_the_bare_one(name: str) -> None:
    how = maker_of(name)
    bare, guard = Run(name, False, how), Run(name, True, how)
    bare.step(0, 1, 2)
    guard.step(0, 1, 2)
    assert same(guard.weights(), bare.weights())

    before = guard.weights(), outcome(guard.state)
    guard.step(99, bad=True)
    assert guard.opt.skipped_steps == 1
    assert same(guard.weights(), before[0]) and outcome(guard.state) == before[1]
    bare.step(3, 4)
    guard.step(3, 4)
    assert same(guard.weights(), bare.weights())
    if name in CANNOT_SAVE:
        assert before[1] is AttributeError
        with pytest.raises(ValueError, match="cannot be saved"):
            Rollback(guard.opt, {"model": guard.model})
        return

    theirs = outcome(lambda: resumed(name, how, guarded=False))
    ours = outcome(lambda: resumed(name, how, guarded=True))
    assert isinstance(theirs, tuple), f"the bare optimizer does not resume: {theirs}"
    assert isinstance(ours, tuple), f"the guarded optimizer does not resume: {ours}"
    assert same(ours[0], theirs[0]) and ours[1] == theirs[1]


@pytest.mark.parametrize("name", sorted(set(DRIVEN) - CANNOT_SAVE))
def test_a_rollback_restores_the_state(name: str) -> None:
    run = Run(name, True, maker_of(name))
    rollback = Rollback(run.opt, {"model": run.model}, every=2, after_skips=1)
    for step in range(2):
        run.step(step)
        rollback.step(step)
    before = run.weights(), run.state()
    run.step(2)
    rollback.step(2)
    run.step(99, bad=True)
    rewind = rollback.step(3)
    assert rewind is not None and rewind.step == 2
    assert same(run.weights(), before[0]) and run.state() == before[1]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unsupported_optimizers_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(TypeError, match=REFUSED[name]):
        GuardedOptimizer(OPTIMIZERS[name](adamw(Model())))


def test_the_lists_name_existing_optimizers() -> None:
    named = {*LEFT_OUT, *REFUSED, *CANNOT_SAVE, *NEED_GRAPH}
    assert named <= set(OPTIMIZERS)
    assert len(DRIVEN) > 180


@pytest.mark.parametrize("name", ["schedulefree.AdamWScheduleFree", "timm.optim.Lookahead"])
def test_attributes_that_training_loops_probe_exist(name: str) -> None:
    run = Run(name, True, maker_of(name))
    run.step(0, 1)
    inner = run.inner
    if name.startswith("schedulefree"):
        trained = run.weights()
        run.opt.eval()
        assert not inner.param_groups[0]["train_mode"] and not same(run.weights(), trained)
        run.opt.train()
        assert inner.param_groups[0]["train_mode"]
    else:
        run.opt.sync_lookahead()
        assert run.opt.is_second_order is False
    assert not hasattr(run.opt, "sync_lookahead" if hasattr(inner, "eval") else "eval")


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_quantised_state_is_copied_with_the_guard(name: str) -> None:
    """A copied torchao optimizer loses attributes and cannot step, but its state is complete."""
    run = Run(f"torchao.optim.{name}", True, MAKERS[0])
    run.step(0, 1)
    before = run.state()
    twin = copy.deepcopy(run.opt)
    assert values(twin.optimizer.state_dict()) == before
    run.step(2)
    assert values(twin.optimizer.state_dict()) == before != run.state()
