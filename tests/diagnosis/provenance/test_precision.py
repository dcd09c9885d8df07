"""A failure is attributed to a 16-bit dtype only if the same computation in float32 is finite."""

import pytest
import torch
from torch import nn

from fastguard import explain_nonfinite
from guardtest.chains import Call, chain, mean, zeros


@pytest.mark.parametrize("to_blame", [True, False])
def test_float16_is_the_cause_only_if_float32_is_finite(to_blame):
    def scores(x):
        return (x + 300.0).square() if to_blame else x / x

    model = nn.Sequential(nn.Linear(4, 4, bias=False), Call(scores)).half()
    report = explain_nonfinite(model, (torch.zeros(2, 4).half(), None), mean)
    assert (report.origin, report.module) == ("forward", "1 (Call)")
    assert report.precision is to_blame
    assert ("the 16-bit format, not the model" in str(report).replace("\n", " ")) is to_blame


def test_an_early_underflow_is_attributed_to_float16():
    model = nn.Sequential(Call(lambda x: 1e-5 * x * 1e-3), Call(lambda x: x / x)).half()
    report = explain_nonfinite(model, (torch.ones(4).half(), None), mean)
    assert report.module == "1 (Call)" and report.inputs[1].absmax == 0
    assert report.precision is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_is_judged_under_autocast_on_a_cpu(dtype):
    class Scores(nn.Module):
        def forward(self, x):
            return (x @ x.T) * (1e34 if dtype is torch.bfloat16 else 1.0)

    batch = torch.full((2, 64), 100.0), None
    model = nn.Sequential(Scores())
    report = explain_nonfinite(model, batch, mean, autocast=torch.autocast("cpu", dtype))
    low = str(dtype).removeprefix("torch.")
    if dtype is torch.float16:
        assert report.module == "0 (Scores)"
        assert report.operation == "aten.mm.default"
        assert report.inputs[0].dtype == low
        assert report.precision is True
    else:  # bfloat16 has the range of float32
        assert report.precision is False
    assert not explain_nonfinite(nn.Sequential(Call(lambda x: x @ x.T)), batch, mean).found


def test_a_conversion_that_overflows_is_explained():
    report = explain_nonfinite(chain(Call(lambda x: (x + 1e5).half().float())), zeros(), mean)
    assert report.kind == "conversion to a narrower dtype"
    assert report.precision is True
