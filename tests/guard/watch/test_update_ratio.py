"""`watch=("update_ratio",)` shows layers that change too much, or not at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastguard.optim
from fastguard import AGC, GuardedOptimizer
from fastguard.guard.watch import update_ratio
from fastguard.optim import cpu
from fastguard.optim.bits import from_remainder


def test_a_layer_with_a_learning_rate_100_times_too_large_is_detected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    groups = [
        {"params": model[0].parameters(), "lr": 1e-4},
        {"params": model[2].parameters(), "lr": 1e-2},  # a hundred times too large
    ]
    opt = GuardedOptimizer(
        torch.optim.AdamW(groups),
        named_parameters=model.named_parameters(),
        watch=("update_ratio",),
        watch_every=1,
    )
    model(torch.randn(8, 32)).square().sum().backward()
    opt.step()
    ratios = opt.records()[0].watch["update_ratio"]
    assert ratios["0.weight"] == pytest.approx(1e-3, rel=0.2)
    assert ratios["2.weight"] == pytest.approx(1e-1, rel=0.2)


@pytest.mark.parametrize(
    ("dtype", "flat"),
    [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True), (torch.float64, True)],
    ids=str,
)
def test_the_ratio_is_the_update_over_the_weight(dtype: torch.dtype, flat: bool) -> None:
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))
    opt = GuardedOptimizer(
        torch.optim.SGD([p], lr=0.5), max_norm=1.0, watch=("update_ratio",), flat_parameters=flat
    )
    p.grad = torch.tensor([0.0, 8.0], dtype=dtype)
    opt.step()
    assert opt.records()[0].watch["update_ratio"] == pytest.approx({"parameter 0": 0.1}, rel=1e-2)


def test_a_skipped_step_has_no_ratio() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=0.5), watch=("update_ratio",))
    p.grad = torch.tensor([math.inf, 1.0])
    opt.step()
    assert opt.records()[0].watch == {}


def test_a_weight_of_zero_has_no_ratio() -> None:
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=0.5), watch=("update_ratio",))
    p.grad = torch.ones(2)
    opt.step()
    assert opt.records()[0].watch == {"update_ratio": {}, "weight_norm": {"parameter 0": 0.0}}


def test_the_norm_of_each_weight_before_the_update() -> None:
    parameters = [nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor(-2.0))]
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.5), watch=("update_ratio",))
    for p in parameters:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.records()[0].watch["weight_norm"] == {"parameter 0": 5.0, "parameter 1": 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_an_update_makes_nonfinite_are_counted_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=3e38),
        named_parameters=model.named_parameters(),
        watch=("update_ratio",),
        watch_every=1,
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    model[1].weight.grad.view(-1)[:4] = 100.0
    model[1].bias.grad[1] = -100.0
    opt.step()
    first, second = (record.watch for record in opt.records())
    assert "nonfinite_weights" not in first
    assert second["nonfinite_weights"] == {"1.weight": 4, "1.bias": 1}


@pytest.mark.parametrize("master", ["float32", "remainder"])
def test_the_ratio_is_that_of_the_exact_weights(master: str) -> None:
    """A step of 1e-4 does not change the bfloat16 weights, but it does change the exact ones."""
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    inner = fastguard.optim.AdamW([p], lr=1e-4, weight_decay=0.0, master=master)  # type: ignore[arg-type]
    opt = GuardedOptimizer(inner, watch=("update_ratio",), watch_every=1)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    assert (p == 1.0).all()
    for record in opt.records():
        assert record.watch["update_ratio"]["parameter 0"] == pytest.approx(1e-4, rel=1e-2)


# The optimizers of fastguard.optim compute the same statistics within their update.

SHAPES = [(300, 40), (7,), (), (0, 3), (2, 3, 4)]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
KINDS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "AdamW": (fastguard.optim.AdamW, F32, {}),
    "AdamW bf16": (fastguard.optim.AdamW, BF16, {}),
    "AdamW remainder": (fastguard.optim.AdamW, BF16, dict(master="remainder")),
    "AdamW fp16 master": (fastguard.optim.AdamW, F16, dict(master="float32")),
    "Adam fp64": (fastguard.optim.Adam, F64, {}),
    "SGD": (fastguard.optim.SGD, F32, dict(momentum=0.9)),
    "Lion stochastic": (fastguard.optim.Lion, BF16, dict(rounding="stochastic")),
}


def exact_weight(optimizer: Any, p: Tensor) -> Tensor:
    state = optimizer.state[p]
    if "remainder" in state:
        return from_remainder(p.detach(), state["remainder"]).double()
    return state.get("master", p).detach().double().clone()


def watched_run(kind: str, **options: Any) -> tuple[list[Any], list[Any]]:
    """Returns the recorded and the true entries of three steps; the second step is skipped."""
    make, dtype, settings = KINDS[kind]
    torch.manual_seed(0)
    named = [(f"w{i}", nn.Parameter(torch.randn(s).to(dtype))) for i, s in enumerate(SHAPES)]
    parameters = [p for _, p in named]
    inner = make([{"params": parameters[:2], "lr": 1e-2}, {"params": parameters[2:]}], **settings)
    opt = GuardedOptimizer(
        inner, named_parameters=named, watch=("update_ratio",), watch_every=1, **options
    )
    truth: list[Any] = []
    for step in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        if step == 1:
            parameters[0].grad.view(-1)[5] = math.nan
        before = [exact_weight(inner, p) for p in parameters]
        opt.step()
        changes = [exact_weight(inner, p) - b for p, b in zip(parameters, before, strict=True)]
        norms = {n: b.norm().item() for (n, p), b in zip(named, before, strict=True) if p.numel()}
        pairs = zip(norms, [c for c in changes if c.numel()], strict=True)
        ratios = {n: c.norm().item() / norms[n] for n, c in pairs}
        truth.append({"update_ratio": ratios, "weight_norm": norms} if step != 1 else {})
    return [record.watch for record in opt.records()], truth


OPTIONS: dict[str, dict[str, Any]] = {
    "unclipped": {},
    "clipped": dict(max_norm=0.5),
    "each tensor": dict(max_norm=0.1, clip_scope="tensor"),
    "AGC": dict(max_norm=AGC(0.01), clip_scope="unit"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_that_measures_its_own_updates(kind, options, monkeypatch):
    monkeypatch.setattr(update_ratio, "_norms_and_counts", None)  # the weights are not copied
    told, truth = watched_run(kind, **options)
    for ours, theirs in zip(told, truth, strict=True):
        assert list(ours) == list(theirs)
        for name, values in theirs.items():
            assert list(ours[name]) == list(values)
            assert ours[name] == pytest.approx(values, rel=1e-5)


def test_statistics_agree_with_and_without_a_copy_of_the_weights():
    def entries(make: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 3))
        inner = make(model.parameters(), lr=1e-2)
        opt = GuardedOptimizer(inner, max_norm=0.1, watch=("update_ratio",))
        model(torch.ones(4, 30)).square().sum().backward()
        opt.step()
        return opt.records()[0].watch

    ours, copied = entries(fastguard.optim.AdamW), entries(torch.optim.AdamW)
    assert list(ours) == list(copied)
    for name, values in copied.items():
        assert ours[name] == pytest.approx(values, rel=1e-5)


def test_only_watched_steps_collect_statistics(monkeypatch):
    asked, take = [], cpu.update

    def update(one: Any) -> Any:
        asked.append(one.statistics is not None)
        return take(one)

    monkeypatch.setattr(cpu, "update", update)
    p = nn.Parameter(torch.ones(2))
    opt = GuardedOptimizer(fastguard.optim.SGD([p], lr=0.5), watch=("update_ratio",), watch_every=2)
    for value in (math.nan, 1.0, 1.0, 1.0):  # the first and the third step are watched
        p.grad = torch.full_like(p, value)
        opt.step()
    assert asked == [False, True, False]
