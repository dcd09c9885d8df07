"""The reference agrees with torch's optimizers in float64, and can skip and clean."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from fastguard.optim import reference
from fastguard.optim.contract import HYPER, STATES, Update

SHAPES = [(7,), (33, 5), (1,), (0,)]
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1),
    "adam": dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1),
    "sgd": dict(lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "lion": dict(lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1),
}


def hyper_of(**values: float) -> Tensor:
    row = {name: 0.0 for name in HYPER} | {"sign": 1.0} | values
    return torch.tensor([[row[name] for name in HYPER]], dtype=torch.float64)


def an_update(
    algorithm: Any, dtype: torch.dtype, grads: list[Tensor] | None = None, **options: Any
) -> Update:
    torch.manual_seed(0)
    parameters = [torch.randn(s, dtype=dtype) for s in SHAPES]
    names = STATES[algorithm][: None if options.get("amsgrad") else 2]
    state_dtype = options.pop("state_dtype", dtype)
    return Update(
        algorithm,
        parameters,
        grads or [torch.randn(s, dtype=dtype) for s in SHAPES],
        {name: [torch.zeros(s, dtype=state_dtype) for s in SHAPES] for name in names},
        [torch.zeros(()) for _ in SHAPES] if algorithm != "lion" else [],
        options.pop("hyper", hyper_of(**SETTINGS[algorithm])),
        [0] * len(SHAPES),
        options.pop("multiplier", torch.ones(1, dtype=torch.float64)),
        [0] * len(SHAPES),
        options.pop("found_inf", torch.zeros(())),
        options.pop("clean", torch.zeros(())),
        **options,
    )


def torch_optimizer(algorithm: str, parameters: list[Tensor], **options: Any) -> Any:
    s = dict(SETTINGS[algorithm])
    if algorithm == "sgd":
        return torch.optim.SGD(parameters, **s, **options)
    s["betas"] = (s.pop("beta1"), s.pop("beta2"))
    kind = torch.optim.AdamW if algorithm == "adamw" else torch.optim.Adam
    return kind(parameters, **s, **options)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "option"),
    [("adamw", None), ("adamw", "amsgrad"), ("adam", None), ("adam", "amsgrad"), ("sgd", None)],
)
def test_the_reference_takes_the_same_steps_as_torch(algorithm, option, maximize):
    options = {option: True} if option else {}
    sign = -1.0 if maximize else 1.0
    update = an_update(
        algorithm,
        torch.float64,
        hyper=hyper_of(**SETTINGS[algorithm], sign=sign),
        **options,
    )
    theirs = [p.clone().requires_grad_() for p in update.parameters]
    optimizer = torch_optimizer(algorithm, theirs, maximize=maximize, foreach=False, **options)
    for _ in range(5):
        for ours, p in zip(update.grads, theirs, strict=True):
            p.grad = torch.randn_like(p)
            ours.copy_(p.grad)
        optimizer.step()
        reference.update(update)
    for ours, p in zip(update.parameters, theirs, strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=1e-12, atol=1e-14)


def test_nesterov_momentum_matches_torch():
    settings = dict(lr=1e-2, momentum=0.9)
    update = an_update("sgd", torch.float64, hyper=hyper_of(**settings), nesterov=True)
    theirs = [p.clone().requires_grad_() for p in update.parameters]
    optimizer = torch.optim.SGD(theirs, **settings, nesterov=True)
    for _ in range(3):
        for ours, p in zip(update.grads, theirs, strict=True):
            p.grad = ours.clone()
        optimizer.step()
        reference.update(update)
    for ours, p in zip(update.parameters, theirs, strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=1e-12, atol=1e-14)


def test_lion_moves_each_weight_by_the_learning_rate():
    update = an_update("lion", torch.float64, hyper=hyper_of(lr=0.5, beta1=0.9, beta2=0.99))
    before = [p.clone() for p in update.parameters]
    reference.update(update)
    for p, old, g, m in zip(
        update.parameters, before, update.grads, update.states["exp_avg"], strict=True
    ):
        torch.testing.assert_close(p, old - 0.5 * g.sign(), rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(m, 0.01 * g, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.nan])
@pytest.mark.parametrize("algorithm", sorted(STATES))
def test_a_skip_writes_nothing(algorithm, found_inf):
    grads = [torch.full(s, math.nan) for s in SHAPES]
    update = an_update(algorithm, torch.float32, grads, found_inf=torch.tensor(found_inf))
    tensors = [*update.parameters, *update.steps, *chain.from_iterable(update.states.values())]
    before = [t.clone() for t in tensors]
    reference.update(update)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("algorithm", sorted(STATES))
def test_cleaning_counts_nonfinite_elements_as_zero(algorithm):
    grads = [torch.randn(s) for s in SHAPES]
    zeroed = [g.clone() for g in grads]
    for g, z in zip(grads[:2], zeroed, strict=False):
        for at, value in ((0, math.nan), (1, math.inf), (2, -math.inf)):
            g.view(-1)[at], z.view(-1)[at] = value, 0.0
    dirty = an_update(algorithm, torch.float32, grads, clean=torch.ones(()))
    clean = an_update(algorithm, torch.float32, zeroed)
    reference.update(dirty)
    reference.update(clean)
    assert all(map(torch.equal, dirty.parameters, clean.parameters))
    assert grads[0][0].isnan()  # the gradient itself is never written


@pytest.mark.parametrize("multiplier", [0.37, 2.0**-120])
def test_each_segment_has_its_multiplier(multiplier):
    grads = [torch.full(s, 2.0**60) for s in SHAPES]
    folded = an_update(
        "sgd", torch.float32, grads, multiplier=torch.tensor([multiplier], dtype=torch.float64)
    )
    scaled = an_update("sgd", torch.float32, [(g.double() * multiplier).float() for g in grads])
    reference.update(folded)
    reference.update(scaled)
    for a, b in zip(folded.parameters, scaled.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=0.0)
