"""The arguments of `explain_nonfinite` are validated before anything runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fastguard import explain_nonfinite, random_state

BATCH = torch.zeros(2, 4), torch.zeros(2, 1)
LOADER = DataLoader([(torch.zeros(4), torch.zeros(1))])


class Large(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e5


@pytest.mark.parametrize("dtype", ["float16", "fp16", "half", torch.float16, "torch.float16"])
def test_autocast_may_be_given_as_a_dtype(dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Large(), nn.Linear(4, 1))
    nn.init.constant_(model[2].weight, 1.0)
    report = explain_nonfinite(model, BATCH, nn.MSELoss(), autocast=dtype)
    assert report.found and report.precision
    assert not explain_nonfinite(model, BATCH, nn.MSELoss(), autocast="bfloat16").found


@pytest.mark.parametrize("device", ["parameter", "buffer"])
def test_a_model_without_values_is_refused(device) -> None:
    model = nn.BatchNorm1d(4, device="meta", affine=device == "parameter")
    with pytest.raises(ValueError, match="has no values yet"):
        explain_nonfinite(model, BATCH, nn.MSELoss())


@pytest.mark.parametrize(
    "change, kind, says",
    [
        ({"model": None}, TypeError, "model is a NoneType, not a torch.nn.Module"),
        (
            {"rng": 3},
            TypeError,
            "rng=3 is not a generator state; pass fastguard.random_state",
        ),
        ({"rng": {}}, TypeError, "rng={} is not a generator state"),
        ({"loss_fn": nn.MSELoss}, TypeError, "pass an instance of it: MSELoss()"),
        ({"loss_fn": 3}, TypeError, "loss_fn=3 cannot be called"),
        ({"loss_fn": None, "step": "x"}, TypeError, "step='x' cannot be called"),
        ({"batch": LOADER}, TypeError, "next(iter(loader))"),
        ({"batch": iter([BATCH])}, TypeError, "next(...) returns one batch"),
        ({"batch": ()}, TypeError, "batch is a tuple of 0; pass (inputs, targets)"),
        ({"autocast": True}, TypeError, "autocast=True is not a context; pass 'float16'"),
        ({"autocast": torch.autocast}, TypeError, "is not a context; pass 'float16'"),
        ({"autocast": "float8"}, ValueError, "choose 'float16' or 'bfloat16'"),
        ({"autocast": "cuda"}, ValueError, "choose 'float16' or 'bfloat16'"),
        ({"loss_scale": "x"}, TypeError, "loss_scale='x' is not a number"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",  # no memory addresses
)
def test_invalid_arguments_raise_errors_that_name_them(change, kind, says) -> None:
    arguments = {"model": nn.Linear(4, 1), "batch": BATCH, "loss_fn": nn.MSELoss()} | change
    with pytest.raises(kind) as error:
        explain_nonfinite(**arguments)
    assert says in str(error.value)


def test_a_generator_state_is_accepted() -> None:
    assert not explain_nonfinite(nn.Linear(4, 1), BATCH, nn.MSELoss(), rng=random_state()).found
