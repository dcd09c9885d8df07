"""The watching stage: the CPU backend and the reference agree with definitions in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastguard
from fastguard.gradients.buckets import bucketize
from fastguard.stages import reference
from fastguard.stages.cpu import stages as cpu
from fastguard.stages.cpu import watch as cpu_watch
from fastguard.stages.watch import count_exponents, read_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
BACKENDS = [reference, cpu]
names: dict[str, Any] = {"ids": lambda b: b.__name__.rsplit(".", 1)[-1]}
INTEGERS = {2: np.int16, 4: np.int32, 8: np.int32}


@pytest.fixture(params=[False, True], ids=["", "small"])
def scaled_down(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers the limits, so that a few hundred elements reach every branch."""
    if request.param:
        for name, value in {"JOINED": 64, "PIECE": 128, "WHOLE": 256, "FEW": 128}.items():
            monkeypatch.setattr(cpu_watch, name, value)


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """Returns tensors of many sizes, some with holes or other strides, with some zeros."""
    torch.manual_seed(0)
    shapes = [(3,), (0,), (40, 3), (), (7, 5), (1000,), (1,), (6, 4, 3, 2), (13,), (300,)]
    made = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    made[4] = made[4].T
    made[7] = made[7].to(memory_format=torch.channels_last)
    made[8] = torch.randn(26).to(dtype)[::2]
    for t in made:
        if t.numel() > 3:
            t.view(t.shape)[0] = 0.0
            t[-1] = -0.0
    made[5][10:20] = float("nan")
    made[9] = torch.zeros_like(made[9])
    return made


def bits_of(t: Tensor) -> np.ndarray:
    """Returns the words of a tensor; numpy has no bfloat16."""
    real = torch.view_as_real(t) if t.is_complex() else t
    data = real.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.view(INTEGERS[real.itemsize]).astype(np.int64)


@pytest.mark.parametrize("backend", BACKENDS, **names)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
def test_bits(
    backend: Any, dtype: torch.dtype, wanted: tuple[bool, bool], scaled_down: None
) -> None:
    given = tensors(dtype)
    segments = [i % 3 for i in range(len(given))]
    [bucket] = bucketize(given, segments=segments, n_segments=4).buckets
    found = backend.read_bits(bucket, 4, *wanted).tolist()
    if wanted[0]:
        expected = [0] * 4
        for i, t in enumerate(given):
            real = torch.view_as_real(t) if t.is_complex() else t
            expected[i % 3] += int((real != 0).sum())
        assert found[:4] == expected
    if wanted[1]:
        expected = sum(int(bits_of(t).sum()) for t in given)
        assert found[4] % 2**32 == expected % 2**32


@pytest.mark.parametrize("backend", BACKENDS, **names)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 2.0**-70])
def test_exponents(backend: Any, dtype: torch.dtype, scale: float | None) -> None:
    given = [t for t in tensors(dtype) if t.is_contiguous()]
    given[0].view(-1)[0] = 2.0**-10
    [bucket] = bucketize(given).buckets
    inv_scale = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    counts = backend.count_exponents(bucket, 3, inv_scale).tolist()
    expected = [0] * 257
    for t in given:
        real = (torch.view_as_real(t) if t.is_complex() else t).reshape(-1)
        for x in real[1 % max(len(real), 1) :: 3].double().tolist():
            y = np.float32(np.float32(x) * np.float32(1.0 if scale is None else scale))
            expected[256 if y == 0 else int(y.view(np.int32)) >> 23 & 0xFF] += 1
    assert counts == expected


def test_float64_beyond_the_range_of_float32_counts_as_zero_or_infinite() -> None:
    [bucket] = bucketize([torch.tensor([1e-300, 1e300, 1.0], dtype=torch.float64)]).buckets
    for backend in BACKENDS:
        counts = backend.count_exponents(bucket, 1)
        assert counts.nonzero().squeeze(1).tolist() == [127, 255, 256]


def test_several_buckets_are_added() -> None:
    given = [torch.ones(3), torch.ones(5, dtype=torch.float64), None, torch.zeros(2)]
    buckets = bucketize(given, segments=range(4), n_segments=4)
    nonzero, checksum = read_bits(buckets, nonzero=True, checksum=True)
    assert nonzero.tolist() == [3, 5, 0, 0]
    assert int(checksum) == (3 * 0x3F800000 + 5 * 0x3FF00000) % 2**32
    assert count_exponents(buckets, 1)[[127, 256]].tolist() == [8, 2]


def test_without_tensors_all_results_are_zero() -> None:
    buckets = bucketize([None, torch.empty(0)], segments=range(2), n_segments=2)
    for given in (buckets, bucketize([None, None], segments=range(2), n_segments=2)):
        nonzero, checksum = read_bits(given, nonzero=True, checksum=True)
        assert (nonzero.tolist(), int(checksum)) == ([0, 0], 0)
        assert not count_exponents(given, 1).any()


def test_flat_buckets_have_the_same_results() -> None:
    """A slot may be longer than its gradient; the gap is zero."""
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 17)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    apart = bucketize([p.grad.clone() for p in parameters])
    flat = fastguard.FlatGradBuckets(parameters).buckets()
    read: Callable[..., Any] = read_bits
    for nonzero, checksum in ((True, True), (False, True)):
        one, other = (read(b, nonzero=nonzero, checksum=checksum) for b in (apart, flat))
        assert one[1] == other[1]
        assert not nonzero or torch.equal(one[0], other[0])
    assert torch.equal(count_exponents(apart, 3), count_exponents(flat, 3))


@pytest.mark.parametrize("backend", BACKENDS, **names)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_negative_bit_is_part_of_the_values(backend: Any, dtype: torch.dtype) -> None:
    x = torch.randn(7).to(dtype)
    lazy = torch._neg_view(x)
    assert lazy.is_neg()
    for wanted in ((True, False), (False, True), (True, True)):
        one, other = (backend.read_bits(bucketize([t]).buckets[0], 1, *wanted) for t in (lazy, -x))
        assert not wanted[0] or one[0] == other[0]
        assert not wanted[1] or (one[1] - other[1]) % 2**32 == 0
    one, other = (backend.count_exponents(bucketize([t]).buckets[0], 1) for t in (lazy, -x))
    assert torch.equal(one, other)
