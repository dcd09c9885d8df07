"""Non-finite gradients in a guarded step, for each mode."""

import math

import pytest
import torch

from fastguard import GuardedOptimizer, NonFiniteGradError, SpikeRule
from guardtest.guarded import one, sgd
from guardtest.tolerances import NORM_RTOL, scale_rtol
from guardtest.training import (
    assert_same_bits,
    give_gradients,
    new_parameters,
    poison,
    same_bits,
    snapshot,
)

NAN, INF = math.nan, math.inf


def grads_of(parameters):
    return [p.grad.clone() for p in parameters]


def test_zero_mode_clips_by_the_norm_of_the_finite_elements():
    p, opt = one(3.0, NAN, 4.0, INF, -INF, nonfinite="zero", max_norm=1.0)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6, 0.0, -0.8, 0.0, 0.0]))
    record = opt.records()[0]
    assert (record.action, record.reason) == ("sanitized", "nonfinite_grad")
    assert (record.nan, record.posinf, record.neginf) == (1, 1, 1)
    assert record.total_norm == 5.0


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_zero_mode_equals_torch_on_the_cleaned_gradients(max_norm):
    a, b = new_parameters(), new_parameters()
    opt = sgd(a, nonfinite="zero", max_norm=max_norm)
    alone = torch.optim.SGD(b, lr=1.0)
    for step in range(3):
        give_gradients(a, step)
        poison(a, NAN, at=step)
        poison(a, INF, at=0)
        give_gradients(b, step)
        poison(b, 0.0, at=step)
        poison(b, 0.0, at=0)
        opt.step()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(b, max_norm)
        alone.step()
    for x, y in zip(a, b, strict=True):
        rtol = 0.0 if max_norm is None else 4 * scale_rtol(torch.float32)
        torch.testing.assert_close(x, y, rtol=rtol, atol=0.0)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_raise_mode_names_the_culprit_and_changes_nothing(fused, flat):
    parameters = new_parameters()
    inner = torch.optim.AdamW(parameters, fused=fused)
    names = [(f"layer.{i}", p) for i, p in enumerate(parameters)]
    opt = GuardedOptimizer(
        inner,
        nonfinite="raise",
        max_norm=0.1,
        spike=SpikeRule(warmup=2, window=4),
        named_parameters=names,
        flat_buckets=flat,
    )
    for step in range(3):
        give_gradients(parameters, step)
        opt.step()
    give_gradients(parameters, 3)
    poison(parameters, NAN, at=1)
    poison(parameters, -INF, at=2)
    before, saved, grads = snapshot(opt), opt.state_dict()["fastguard"], grads_of(parameters)
    with pytest.raises(NonFiniteGradError) as error:
        opt.step(loss=1.0)
    assert error.value.culprits == [("layer.1", 1, 0, 0), ("layer.2", 0, 0, 1)]
    assert "layer.1 (1 NaN), layer.2 (1 -Inf)" in str(error.value)
    assert_same_bits(snapshot(opt), before)
    assert all(map(same_bits, grads_of(parameters), grads))
    for key, value in opt.state_dict()["fastguard"].items():
        assert same_bits(value, saved[key]), key
    give_gradients(parameters, 3)
    opt.step()
    assert opt.applied_steps == 4


def test_raise_mode_leaves_gradients_unclamped():
    p, opt = one(5.0, NAN, nonfinite="raise")
    opt.param_groups[0]["clip_value"] = 1.0
    with pytest.raises(NonFiniteGradError):
        opt.step()
    assert p.grad[0] == 5.0
    p.grad = torch.tensor([5.0, -0.5])
    with pytest.raises(NonFiniteGradError, match="loss=nan"):
        opt.step(loss=NAN)
    assert p.grad[0] == 5.0
    opt.step()
    assert p.tolist() == [-1.0, 0.5]


def test_raise_mode_raises_for_a_loss_by_name():
    p, opt = one(1.0, nonfinite="raise")
    with pytest.raises(NonFiniteGradError, match="aux=inf") as error:
        opt.step(loss={"main": torch.tensor(1.0), "aux": torch.tensor(INF)})
    assert "main" not in str(error.value)
    assert error.value.culprits == []
    assert p.item() == 0.0


@pytest.mark.parametrize("value", [None, NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("max_norm", [1e-2, 1e9], ids=["clips", "does-not"])
def test_propagate_equals_torch(value, max_norm):
    """Results are bitwise equal, except for the last digit of a coefficient below 1."""
    a, b = new_parameters(), new_parameters()
    opt = GuardedOptimizer(
        torch.optim.AdamW(a, fused=True), nonfinite="propagate", max_norm=max_norm
    )
    alone = torch.optim.AdamW(b, fused=True)
    for step in range(3):
        for parameters in (a, b):
            give_gradients(parameters, step)
            if value is not None:
                poison(parameters, value)
        opt.step(loss=NAN)
        torch.nn.utils.clip_grad_norm_(b, max_norm)
        alone.step()
        for x, y in zip(grads_of(a), grads_of(b), strict=True):
            if value is None and max_norm == 1e-2:
                torch.testing.assert_close(x, y, rtol=2 * scale_rtol(torch.float32), atol=0.0)
            else:
                assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
                assert torch.equal(x.signbit(), y.signbit()) or x.isnan().any()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert opt.skipped_steps == 0
    assert bool(a[-1].isnan()) == (value is not None)


def test_propagate_records_a_nan_coefficient_as_a_change():
    _, opt = one(1.0, NAN, nonfinite="propagate", max_norm=1.0)
    opt.step()
    record = opt.records()[0]
    assert math.isnan(record.clip_coef)
    assert (record.action, record.reason, record.nan) == ("clipped", "nonfinite_grad", 1)


@pytest.mark.parametrize("max_norm", [None, INF])
@pytest.mark.parametrize("mode", ["skip", "zero", "raise", "propagate"])
def test_without_a_limit_nothing_is_ever_multiplied(mode, max_norm):
    p, opt = one(3e30, -4e30, nonfinite=mode, max_norm=max_norm)
    opt.step()
    assert p.tolist() == torch.tensor([-3e30, 4e30]).tolist()
    assert opt.records()[0].total_norm == pytest.approx(5e30, rel=NORM_RTOL)
    if mode == "propagate":  # torch makes every gradient NaN here
        p.grad = torch.tensor([1.0, INF])
        opt.step()
        assert p.grad.tolist() == [1.0, INF]


def test_a_large_finite_gradient_is_clipped_and_not_called_nonfinite():
    """The square overflows float32; other implementations treat the gradient as Inf."""
    p, opt = one(1e20, 1e20, max_norm=1.0)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), -math.sqrt(0.5)))
    assert opt.records()[0].reason is None


def test_an_assigned_mode_applies_from_the_next_step_on():
    p, opt = one(3.0, NAN, max_norm=1.0)
    opt.step()
    opt.nonfinite = "zero"
    p.grad = torch.tensor([3.0, NAN])
    opt.step()
    opt.nonfinite, opt.max_norm = "propagate", None
    p.grad = torch.tensor([2.0, NAN])
    opt.step()
    assert [record.action for record in opt.records()] == ["skipped", "sanitized", "applied"]
    assert p[0].item() == pytest.approx(-3.0) and p[1].isnan()
    opt.nonfinite = "raise"
    p.grad = torch.tensor([2.0, NAN])
    with pytest.raises(NonFiniteGradError):
        opt.step()
    opt.nonfinite = "other"
    with pytest.raises(ValueError, match="nonfinite='other' is unknown; use one of skip"):
        opt.step()
    opt.nonfinite = "skip"
    opt.step()
    assert opt.skipped_steps == 2 and p[0].item() == pytest.approx(-3.0)
