"""Validation, averaging and stacking of losses."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastguard.records.losses import ObservedLosses, named_losses, stacked

read_losses = functools.partial(named_losses, read=True)


@pytest.mark.parametrize(
    "loss",
    [
        2.0, 2, torch.tensor(2.0), torch.tensor([[2.0]]), torch.tensor(2), torch.tensor(2.0).half(),
        np.float64(2.0), np.float32(2.0), np.float16(2.0), np.int64(2), Fraction(2),
    ],
    ids=repr,
)  # fmt: skip
def test_a_loss_without_a_name_is_called_loss(loss):
    losses = read_losses(loss)
    assert losses == {"loss": 2.0} and type(losses["loss"]) is float
    assert named_losses(loss) == losses
    assert named_losses({"ce": loss}) == {"ce": 2.0}


def test_no_loss_gives_an_empty_dict():
    assert named_losses(None) == {}
    assert named_losses({}) == {}


@pytest.mark.parametrize("losses_by_name", [named_losses, read_losses])
def test_losses_are_detached(losses_by_name):
    for device in ("cpu", "meta"):
        x = torch.ones(1, requires_grad=True, device=device)
        loss = losses_by_name({"a": x * 2})["a"]
        if losses_by_name is read_losses and device == "cpu":
            assert loss == 2.0 and type(loss) is float
        else:
            assert not loss.requires_grad and loss.shape == ()


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (torch.ones(3), ValueError, r"loss has shape \(3,\).*\.mean\(\)"),
        ({"ce": torch.ones(2, 2)}, ValueError, r"ce has shape \(2, 2\)"),
        (torch.ones(0), ValueError, r"loss has shape \(0,\)"),
        ("1.0", TypeError, r"loss='1.0' is a str"),
        ({"ce": None}, TypeError, "ce=None is a NoneType"),
        (True, TypeError, "loss=True is a bool"),
        ([1.0], TypeError, r"loss=\[1.0\] is a list"),
        (1j, TypeError, "loss=1j is a complex; pass a scalar tensor"),
        (np.bool_(True), TypeError, "loss=.* is a bool"),
        (torch.tensor(True), TypeError, "loss.* is a bool.*; pass a scalar tensor"),
        (torch.tensor(True, device="meta"), TypeError, "loss.* is a bool tensor; pass"),
        ({"ce": torch.tensor(1 + 1j)}, TypeError, "ce.* is a complex"),
        pytest.param(10**400, ValueError, "loss=1000.* is beyond the.*; pass float", id="int"),
        pytest.param(
            {"ce": Fraction(10**400)}, ValueError, "ce=Fraction.* is beyond", id="fraction"
        ),
        ({"a\x1b[2J\nok": None}, TypeError, r"a\\x1b\[2J\\nok=None"),
        ({"a\x1b[2J\nok": torch.ones(2)}, ValueError, r"a\\x1b\[2J\\nok has shape"),
        ("\x1b\n" * 5000, TypeError, r"loss='.{1,60}… is a str"),
        ({"grad_norm": 1.0}, ValueError, "'grad_norm', which is reserved for the gradient norm"),
    ],
)
@pytest.mark.parametrize("losses_by_name", [named_losses, read_losses])
def test_values_that_are_not_losses_are_an_error(loss, error, message, losses_by_name):
    with pytest.raises(error, match=message):
        losses_by_name(loss)


def test_means_over_micro_batches():
    observed = ObservedLosses()
    for ce, aux in ((1.0, 4.0), (2.0, None), (6.0, 5.0)):
        observed.observe(read_losses({"ce": ce} if aux is None else {"ce": ce, "aux": aux}))
    means = observed.take()
    assert means == {"ce": 3.0, "aux": 4.5}
    joined = stacked(means, torch.device("cpu"))
    assert joined.dtype == torch.float64 and joined.tolist() == [3.0, 4.5]
    assert observed.take() == {}


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_one_nonfinite_micro_batch_makes_the_mean_nonfinite(bad):
    observed = ObservedLosses()
    for value in [1.0, *bad, 2.0]:
        observed.observe(read_losses(torch.tensor(value)))
    assert not math.isfinite(observed.take()["loss"])


def test_large_losses_do_not_overflow():
    observed = ObservedLosses()
    for _ in range(4):
        observed.observe(read_losses(torch.tensor(3e38)))
    assert observed.take()["loss"] == pytest.approx(3e38, rel=1e-6)


@pytest.mark.parametrize("losses_by_name", [named_losses, read_losses])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_caller_may_reuse_its_buffer(dtype, losses_by_name):
    buffer = torch.tensor(1.0, dtype=dtype)
    observed = ObservedLosses()
    observed.observe(losses_by_name(buffer))
    buffer.fill_(math.nan)
    assert observed.take()["loss"] == 1.0


def test_a_loss_from_inference_mode_can_be_added_to():
    observed = ObservedLosses()
    with torch.inference_mode():
        observed.observe(named_losses(torch.tensor(1.0)))
    observed.observe(named_losses(torch.tensor(3.0)))
    assert observed.take()["loss"].item() == 2.0


def test_numbers_and_tensors_are_stacked_in_one_vector():
    losses = {"ce": 0.5, "aux": torch.tensor(2.0, dtype=torch.float64)}
    assert stacked(losses, torch.device("cpu")).tolist() == [0.5, 2.0]
    assert stacked({}, torch.device("cpu")).shape == (0,)
