"""The ops of compiled code, with the interpreted kernels instead of the reference."""

import math

import pytest
import torch

import fastguard
from fastguard.functional import clip, ops
from fastguard.gradients.tensor_kinds import Kind
from fastguard.stages import backend
from fastguard.stages import triton as triton_stages


@pytest.fixture(autouse=True)
def use_the_kernels(monkeypatch):
    """Uses the kernels on the CPU, also for `decide`, which otherwise has a shortcut."""
    monkeypatch.setattr(backend, "stages", lambda device, kind=Kind.PLAIN: triton_stages)
    monkeypatch.setattr(ops, "decide_stage", triton_stages.decide)
    monkeypatch.setattr(clip, "decide", triton_stages.decide)


def grads():
    return [torch.randn(5, 3), torch.randn(70), torch.randn(0)]


def limit(value=1.0):
    return torch.full((1,), value, dtype=torch.float64)


def calls():
    summary, counts = torch.ops.fastguard.measure(grads(), 2.0)
    one, no = torch.full((1,), 0.5, dtype=torch.float64), torch.zeros(())
    return {
        "measure": (grads(), 2.0),
        "measure_tensors": (grads(), math.inf),
        "decide": (summary, counts, limit(), 2.0, "zero", None),
        "apply": (grads(), one, no),
    }


@pytest.mark.parametrize("name", ["measure", "measure_tensors", "decide", "apply"])
def test_opcheck(name):
    arguments = calls()[name]
    torch.library.opcheck(getattr(torch.ops.fastguard, name).default, arguments)


@pytest.mark.parametrize("mode", ["propagate", "zero"])
def test_the_drop_in_functions_use_the_kernels(mode):
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 4100, 1)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    copies = [p.grad.clone() for p in parameters]
    norm = fastguard.clip_grad_norm_(parameters, 1.0, nonfinite=mode)
    want = torch.nn.utils.get_total_norm([c.double() for c in copies])
    torch.testing.assert_close(norm.double(), want, rtol=1e-7, atol=0)
    for p, c in zip(parameters, copies, strict=True):
        torch.testing.assert_close(p.grad.double(), c.double() / (want + 1e-6), rtol=1e-6, atol=0)
