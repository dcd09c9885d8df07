"""Scripted training: every optimizer of torch, gradients by step number, bitwise comparison."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard.errors.versions import FUSED_ADAGRAD

SHAPES = ((3, 4), (5,), (2, 3, 2), ())
NONFINITE = {"nan": float("nan"), "+inf": float("inf"), "-inf": float("-inf")}

# These optimizers need more than `step()` on dense gradients, and have separate tests.
SPECIAL = (torch.optim.LBFGS, torch.optim.SparseAdam)

# Settings with additional state.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": (
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ),
    "Adam": ({}, {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW": ({}, {"amsgrad": True}),
    "RMSprop": ({}, {"momentum": 0.9, "centered": True}),
    "Adagrad": ({}, {"initial_accumulator_value": 0.1}),
}


def optimizer_classes() -> list[type[Optimizer]]:
    """Every optimizer of torch, including new ones."""
    found = [
        cls
        for cls in vars(torch.optim).values()
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
    ]
    return sorted(found, key=lambda cls: cls.__name__)


def variants() -> list[tuple[str, type[Optimizer], dict[str, Any]]]:
    """`(id, class, keyword arguments)` of each optimizer, setting and implementation.

    capturable=True is included for fused optimizers. The other implementations need a GPU for it;
    see tests/gpu/test_optimizer_capturable.py.
    """
    listed = []
    for cls in optimizer_classes():
        if cls in SPECIAL:
            continue
        accepts = inspect.signature(cls).parameters
        implementations: list[dict[str, Any]] = [{}]
        if "foreach" in accepts:
            implementations = [{"foreach": False}, {"foreach": True}]
        if "fused" in accepts:
            implementations.append({"fused": True})
            if "capturable" in accepts:
                implementations.append({"capturable": True, "fused": True})
        for i, setting in enumerate(SETTINGS.get(cls.__name__, ({},))):
            for kwargs in implementations:
                how = next(iter(kwargs), "plain")
                how = "single" if kwargs.get("foreach") is False else how
                listed.append((f"{cls.__name__}{i or ''}-{how}", cls, {**setting, **kwargs}))
    return listed


def obeys_found_inf(cls: type[Optimizer], kwargs: dict[str, Any]) -> bool:
    """Whether the kernel reads `found_inf`: all fused kernels do, Adagrad's since torch 2.12."""
    if cls is torch.optim.Adagrad and FUSED_ADAGRAD.missing:
        return False
    return bool(kwargs.get("fused"))


def new_parameters(
    shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Parameters that depend only on the shapes and the dtype."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def parameters_for(cls: type[Optimizer]) -> list[nn.Parameter]:
    return new_parameters([(3, 4), (4, 2)] if cls.__name__ == "Muon" else SHAPES)


def give_gradients(parameters: Iterable[Tensor], step: int) -> None:
    """Gradients that depend only on the step number."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def poison(parameters: Sequence[Tensor], value: float = float("nan"), at: int = -1) -> None:
    """Sets the last element of one gradient."""
    grad = parameters[at].grad
    assert grad is not None
    grad.view(-1)[-1] = value


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Copies of all weights and of every entry of the state."""
    copies: dict[str, Any] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):
        copies[f"p{i}"] = p.detach().clone()
        for key, value in optimizer.state.get(p, {}).items():
            copies[f"p{i}.{key}"] = _copied(value)
    return copies


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(v) for key, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def same_bits(a: Any, b: Any) -> bool:
    """Checks bitwise equality: NaN equals itself, and 0.0 differs from -0.0."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        return _bytes(a) == _bytes(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    return type(a) is type(b) and repr(a) == repr(b)


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(actual) == list(expected)
    different = [key for key in expected if not same_bits(actual[key], expected[key])]
    assert not different, f"changed: {different}"
