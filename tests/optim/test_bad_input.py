"""Invalid arguments raise an error that names the value and the remedy, and change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastguard
import fastguard.optim as guarded

BF16 = torch.bfloat16


def parameter(dtype: torch.dtype = torch.float32) -> Any:
    return torch.nn.Parameter(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("kind", [guarded.AdamW, guarded.Adam, guarded.Lion, guarded.SGD])
@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        (torch.float32, dict(master="remainder"), "master='remainder'.*float32.*master=None"),
        (torch.float32, dict(master="float32"), "master='float32'.*float32.*master=None"),
        (torch.float16, dict(master="remainder"), "float16.*master='float32'"),
        (torch.float32, dict(rounding="stochastic"), "stochastic.*float32.*rounding='nearest'"),
        (BF16, dict(rounding="stochastic", master="remainder"), "exact master"),
        (torch.float16, dict(rounding="stochastic", master="float32"), "16 bits.*exact master"),
        (torch.float64, dict(state_dtype=BF16), "state_dtype=torch.bfloat16.*float64"),
        (BF16, dict(master="fp32"), "master='fp32' is unknown.*'remainder'"),
        (BF16, dict(rounding="up"), "rounding='up' is unknown.*'stochastic'"),
        (BF16, dict(state_dtype=torch.int8), "state_dtype=torch.int8.*torch.float32"),
        (BF16, dict(seed=-1), "seed=-1"),
        (torch.float32, dict(lr=-1.0), "lr=-1.0 must be a number >= 0"),
        (torch.float32, dict(lr=float("nan")), "lr=nan must be a number >= 0"),
        (torch.float32, dict(weight_decay=-0.1), "weight_decay=-0.1"),
    ],
)
def test_an_unsupported_value(kind, dtype, settings, message):
    with pytest.raises(ValueError, match=message):
        kind([parameter(dtype)], **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (guarded.AdamW, dict(betas=(0.9, 1.0)), r"betas\[1\]=1.0 must be in \[0, 1\)"),
        (guarded.Lion, dict(betas=0.9), "betas=0.9 must be two numbers"),
        (guarded.SGD, dict(nesterov=True), "nesterov=True needs momentum > 0"),
        (guarded.SGD, dict(momentum=-1.0), "momentum=-1.0"),
        (guarded.Adam, dict(eps=-1e-8), "eps=-1e-08"),
    ],
)
def test_a_hyper_parameter_out_of_range(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind([parameter()], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(fused=True), "no argument 'fused': the update is always fused; leave it out"),
        (dict(foreach=True), "no argument 'foreach'.*leave it out"),
        (dict(differentiable=True), "use the optimizer of torch.optim"),
        (dict(reproducable=True), "did you mean 'reproducible'"),
    ],
)
def test_an_unknown_keyword(settings, message):
    with pytest.raises(TypeError, match=message):
        guarded.AdamW([parameter()], **settings)


def test_a_complex_parameter():
    with pytest.raises(TypeError, match=r"complex64.*torch.optim"):
        guarded.AdamW([parameter(torch.complex64)])


def test_an_unsupported_group_is_not_added():
    optimizer = guarded.AdamW([parameter(BF16)], master="remainder")
    with pytest.raises(ValueError, match="parameter 0 of param group 1"):
        optimizer.add_param_group({"params": [parameter()]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [parameter()], "master": None})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("found_inf", [None, 1.0])
def test_a_sparse_gradient_is_refused_before_anything_changes(found_inf):
    first, second = parameter(), torch.nn.Parameter(torch.ones(4, 2))
    optimizer = guarded.AdamW([first, second])
    if found_inf is not None:
        optimizer.found_inf = torch.tensor(found_inf)
    first.grad = torch.ones(3)
    second.grad = torch.eye(4, 2).to_sparse()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(TypeError, match=r"parameter 1 of param group 0 is sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(first.detach(), torch.ones(3))
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("kind", [guarded.AdamW, guarded.Adam, guarded.Lion, guarded.SGD])
@pytest.mark.parametrize(
    "value", [None, "1e-3", memoryview(b"0.1"), True], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_setting_that_is_replaced_by_something_else_than_a_number(kind, name, value):
    p = parameter()
    opt = fastguard.GuardedOptimizer(kind([p], lr=0.1, weight_decay=0.0))
    opt.param_groups[0][name] = value
    p.grad = torch.ones(3)
    with pytest.raises(TypeError, match=f"^{name}=.* is not a number"):
        opt.step()
    assert p.tolist() == [1.0] * 3 and opt.steps_taken == 0
    opt.param_groups[0][name] = 0.5
    opt.step()
    assert opt.applied_steps == 1
