"""Values that were non-finite before the step are reported: batch, parameters, buffers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastguard import explain_nonfinite
from guardtest.chains import chain, mean

NAN, INF = math.nan, math.inf


def test_nan_in_the_inputs_is_reported():
    inputs = torch.randn(2, 4)
    inputs[1, 2] = NAN
    report = explain_nonfinite(chain(), (inputs, None), mean)
    assert (report.origin, report.tensor) == ("batch", "batch[0]")
    assert report.module == "0 (Linear)"
    assert report.inputs[0].nan == 1
    assert "check_batch" in report.remedy


def test_nan_in_the_targets_is_reported():
    batch = {"inputs": torch.randn(2, 4), "targets": torch.tensor([[NAN, INF, 0, 0]] * 2)}
    report = explain_nonfinite(chain(), batch, F.mse_loss)
    assert (report.origin, report.tensor) == ("batch", "batch['targets']")
    assert (report.already[0].nan, report.already[0].posinf) == (2, 2)


@pytest.mark.parametrize("index, origin", [(3, "parameter"), (0, None)], ids=["hit", "missed"])
def test_a_nan_row_of_an_embedding_matters_only_if_the_batch_reads_it(index, origin):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[3] = NAN
    report = explain_nonfinite(model, (torch.tensor([[0, index]]), None), mean)
    assert report.origin == origin
    assert [r.name for r in report.already] == ["0.weight"]
    if origin:
        assert (report.tensor, report.module) == ("0.weight", "0 (Embedding)")


def test_a_bad_running_variance_is_reported_as_a_buffer():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var[0] = INF
    model[1].running_mean[0] = NAN
    report = explain_nonfinite(model, (torch.randn(2, 4), None), mean)
    assert (report.origin, report.module) == ("buffer", "1 (BatchNorm1d)")
