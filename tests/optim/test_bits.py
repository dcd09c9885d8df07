"""Remainders are exact; noise is unbiased and independent of how tensors are split."""

from __future__ import annotations

import math

import pytest
import torch

from fastguard.optim import bits


def test_a_bfloat16_and_its_remainder_restore_the_float32_bit_for_bit():
    torch.manual_seed(0)
    x = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4028235e38, 1e-45])])
    x = x[~x.isnan()]
    high, low = bits.split(x)
    assert torch.equal(bits.from_remainder(high, low).view(torch.int32), x.view(torch.int32))
    assert (
        (high.float() - x)
        .abs()
        .le(2.0**-8 * x.abs() + 2.0**-133)
        .logical_or(~high.isfinite() | ~x.isfinite())
        .all()
    )


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000])
def test_any_nan_stays_nan(pattern):
    x = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
    high, low = bits.split(x)
    assert high.isnan().all()
    assert bits.from_remainder(high, low).isnan().all()
    assert bits.narrowed(x, torch.tensor([0xFFFF])).isnan().all()


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [1.001, -3.1e-5, 1.0])
def test_rounding_with_noise_is_unbiased(value, number):
    n = 10**6
    x = torch.full((n,), value)
    key = bits.noise_key(torch.tensor(7), torch.tensor(3))
    rounded = bits.narrowed(x, bits.with_noise(bits.stream(key, 0, x), number)).double()
    below, above = rounded.min().item(), rounded.max().item()
    exact = x[0].item()
    assert below <= exact <= above
    share = 0.0 if above == below else (exact - below) / (above - below)
    sigma = (above - below) * math.sqrt(share * (1 - share) / n)
    assert abs(rounded.mean().item() - exact) <= 4 * sigma


@pytest.mark.parametrize(
    "value",
    [
        1.0003,
        -0.1,
        65500.5,
        6.1e-5,
        6.1035e-05,
        -3.3e-6,
        5.96e-8,
        2e-9,
        -1e-12,
        0.0,
        1.5 * 2.0**-24,
    ],
)
def test_rounding_to_float16_with_noise_is_unbiased(value):
    """Tests normal and subnormal numbers and their border; the noise has a resolution of 2^-16."""
    n = 10**6
    x = torch.full((n,), value)
    key = bits.noise_key(torch.tensor(7), torch.tensor(3))
    noise = bits.with_noise(bits.stream(key, 0, x), 0)
    rounded = bits.narrowed(x, noise, torch.float16)
    exact = x[0].item()
    unit = max(2.0 ** (math.floor(math.log2(abs(exact) or 1e-30)) - 10), 2.0**-24)
    assert (rounded.double() - exact).abs().max() < unit
    share = abs(exact) / unit % 1
    sigma = unit * math.sqrt(share * (1 - share) / n)
    assert abs(rounded.double().mean().item() - exact) <= 4 * sigma + 2.0**-16 * unit


def test_float16_keeps_its_own_numbers_infinities_nan_and_signs():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.float16)
    for noise in (0, 0xFFFF):
        kept = bits.narrowed(every.float(), torch.full(every.shape, noise), torch.float16)
        same = kept.view(torch.int16) == every.view(torch.int16)
        assert (same | (kept.isnan() & every.isnan())).all()


def test_float16_does_not_overflow_earlier_than_rounding_to_nearest():
    x = torch.tensor([65504.0, 65519.9, 65520.0, 1e6, -65519.9, -65520.0])
    largest = bits.narrowed(x, torch.full(x.shape, 0xFFFF), torch.float16).tolist()
    assert largest == [65504.0, 65504.0, math.inf, math.inf, -65504.0, -math.inf]


def test_noise_does_not_depend_on_how_a_tensor_is_split():
    key = bits.noise_key(torch.tensor(7), torch.tensor(3))
    whole = bits.stream(key, 2**32 - 10, torch.empty(100))
    parts = [bits.stream(key, 2**32 - 10 + at, torch.empty(25)) for at in range(0, 100, 25)]
    assert torch.equal(whole, torch.cat(parts))


def test_noise_follows_memory_order_and_differs_between_steps_and_seeds():
    key = bits.noise_key(torch.tensor(7), torch.tensor(3))
    transposed = torch.empty(5, 4).t()
    assert torch.equal(bits.stream(key, 0, transposed).t(), bits.stream(key, 0, torch.empty(5, 4)))
    for seed, step in ((7, 4), (8, 3)):
        other = bits.noise_key(torch.tensor(seed), torch.tensor(step))
        equal = bits.stream(key, 0, torch.empty(1000)) == bits.stream(other, 0, torch.empty(1000))
        assert equal.sum() < 5


def test_infinities_are_not_rounded_away():
    x = torch.tensor([math.inf, -math.inf])
    assert torch.equal(bits.narrowed(x, torch.tensor([0xFFFF, 0xFFFF])).float(), x)
