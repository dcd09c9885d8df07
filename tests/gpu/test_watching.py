"""Losses, batches and activations are watched without waiting, and bad batches are explained."""

import math

import torch
from torch import nn

import fastguard


def test_watching_does_not_wait(no_sync):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).cuda()
    meter, x = fastguard.LossMeter(), torch.randn(8, 4, device="cuda")
    loss, weight = torch.tensor([1.0, math.nan], device="cuda"), torch.ones((), device="cuda")
    guard = fastguard.ActivationGuard(model, mode="clean", limit=10.0)
    with no_sync():
        for i in range(3000):  # the rows of the meter fill up twice
            meter.update({"a": loss[i % 2], "b": 1.0}, weight, tag=i)
        model(x * math.nan)  # makes every output NaN
        check = fastguard.check_batch((x, {"labels": x > 0}), low=0.0)
        signals = check.signals()
    assert meter.compute().means == {"a": 1.0, "b": 1.0}
    assert meter.compute().nonfinite == {"a": 1500, "b": 0}
    assert meter.compute().bad[0].tag == 1
    assert guard.counts()["0"].nan == 32
    assert signals["batch.inputs"].is_cuda
    assert [p.kind for p in check.problems()] == ["low"]


def test_a_replay_under_autocast_names_the_product_that_overflows_float16():
    model = nn.Linear(64, 4, bias=False).cuda()
    nn.init.constant_(model.weight, 50.0)
    batch = torch.full((2, 64), 100.0, device="cuda"), None
    report = fastguard.explain_nonfinite(
        model,
        batch,
        lambda output, _: output.float().mean(),
        autocast=torch.autocast("cuda", torch.float16),
    )
    assert (report.origin, report.module) == ("forward", "the model (Linear)")
    assert report.kind == "matrix product or convolution"
    assert report.precision is True


def test_a_backward_pass_on_the_device():
    model = nn.Linear(4, 4, bias=False).cuda()
    batch = torch.zeros(2, 4, device="cuda"), None
    report = fastguard.explain_nonfinite(model, batch, lambda y, _: y.abs().sqrt().mean())
    assert (report.origin, report.operation) == ("backward", "SqrtBackward0")
