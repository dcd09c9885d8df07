"""Gradients in flat buffers give the same results as without them."""

import pytest
import torch
from torch import nn

from fastguard import FlatGradBuckets, GuardedOptimizer, NonFiniteGradError, clip_grad_norm_
from guardtest.flat import attached, backward, gaps, model_of
from guardtest.training import new_parameters

NAN = float("nan")


def test_gradients_live_in_one_buffer_and_zeroing_is_one_fill():
    model = model_of()
    flat = FlatGradBuckets(model.parameters())
    backward(model, 0)
    assert attached(flat)
    assert len(flat.buffers) == 1
    flat.zero_()
    assert not any(p.grad.any() for p in model.parameters())
    for p in model.parameters():
        assert p.grad.data_ptr() % 16 == flat.buffers[0].flat.data_ptr() % 16


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("trusted", [False, True], ids=["", "trusted"])
def test_clipping_equals_the_plain_function_bit_for_bit(trusted, channels_last):
    for max_norm in (1e9, 1e-3):
        a, b = model_of(channels_last), model_of(channels_last)
        flat = FlatGradBuckets(a.parameters(), trusted=trusted)
        for step in range(2):
            flat.zero_()
            b.zero_grad()
            backward(a, step)
            backward(b, step)
            norm = flat.clip_grad_norm_(max_norm)
            expected = clip_grad_norm_(b.parameters(), max_norm)
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0.0)
                if max_norm == 1e9:
                    assert torch.equal(p.grad, q.grad)


def test_slots_have_the_strides_of_their_parameters():
    """Fused optimizers iterate over parameter, gradient and state together."""
    model = model_of(channels_last=True)
    FlatGradBuckets(model.parameters())
    for p in model.parameters():
        assert p.grad.stride() == p.stride()
    holes = nn.Parameter(torch.zeros(4, 6)[:, ::2])
    FlatGradBuckets([holes])
    assert holes.grad.is_contiguous()


def test_measure_names_the_culprit():
    model = model_of()
    flat = FlatGradBuckets(model.named_parameters())
    backward(model, 0)
    model[3].weight.grad[0, 0] = NAN
    assert flat.measure().culprits() == [("3.weight", 1, 0, 0)]
    with pytest.raises(NonFiniteGradError, match=r"3.weight \(1 NaN\)"):
        flat.clip_grad_norm_(1.0, error_if_nonfinite=True)
    flat.clip_grad_norm_(1.0, nonfinite="zero")
    assert flat.measure().culprits() == []


def test_each_dtype_has_its_own_buffer_and_there_is_one_norm():
    parameters = [nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    flat = FlatGradBuckets(parameters)
    for p in parameters:
        p.grad.fill_(2.0)
    assert len(flat.buffers) == 3
    assert flat.measure().total_norm.item() == pytest.approx(32**0.5)
    flat.clip_grad_norm_(1.0)
    assert flat.measure().total_norm.item() == pytest.approx(1.0, rel=1e-2)


def test_existing_gradients_are_moved_into_the_buffer():
    (p,) = new_parameters([(3,)])
    p.grad = torch.tensor([1.0, 2.0, 2.0])
    flat = FlatGradBuckets([p])
    assert attached(flat)
    assert flat.measure().total_norm == 3.0


def test_autograd_accumulates_into_the_slots():
    a, b = model_of(), model_of()
    flat = FlatGradBuckets(a.parameters())
    for step in range(3):
        backward(a, step)
        backward(b, step)
    assert attached(flat)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_nan_coefficient_does_not_reach_the_gaps():
    parameters = new_parameters([(3,), (5,), (1,)])
    flat = FlatGradBuckets(parameters)
    parameters[0].grad.fill_(NAN)
    flat.clip_grad_norm_(1.0)
    assert all(p.grad.isnan().all() for p in parameters)
    assert not any(g.any() for g in gaps(flat))


def test_gaps_between_slots_stay_zero():
    """A NaN coefficient that multiplies whole runs must not remain in the gaps."""
    parameters = new_parameters([(3,), (5,), (1,)])
    opt = GuardedOptimizer(
        torch.optim.SGD(parameters, lr=0.1), max_norm=1.0, nonfinite="propagate", flat_buckets=True
    )
    for value in (1.0, NAN, float("inf"), 1.0):
        for p in parameters:
            p.grad.fill_(value)
        opt.step()
        assert not any(g.any() for g in gaps(opt._gradients.flat))
        opt.zero_grad()
    assert sum(len(g) for g in gaps(opt._gradients.flat)) == 1 + 3 + 3
    assert opt.records()[-1].total_norm == 3.0


def test_two_buckets_over_the_same_parameters_agree():
    parameters = new_parameters([(3,), (4,)])
    first, second = FlatGradBuckets(parameters), FlatGradBuckets(parameters)
    for p in parameters:
        p.grad.fill_(2.0)
    assert first.measure().total_norm == second.measure().total_norm
    first.clip_grad_norm_(1.0)
    assert second.measure().total_norm.item() == pytest.approx(1.0)


def test_release_gives_gradients_their_own_memory():
    parameters = new_parameters([(3,), (4,)])
    flat = FlatGradBuckets(parameters)
    for p in parameters:
        p.grad.fill_(2.0)
    flat.release()
    assert not attached(flat)
    assert all((p.grad == 2.0).all() for p in parameters)
