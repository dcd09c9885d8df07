"""Replica drift in one process: any flipped bit changes the checksum, and its rank is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastguard.guard.watch.replica_drift import _number_of, checksum, differing


def sums_of(values: list[int]) -> tuple[int, int, int]:
    n = range(len(values))
    return (
        sum(values),
        sum(c * c for c in values),
        sum(_number_of(i) * c for i, c in zip(n, values, strict=True)),
    )


@pytest.mark.parametrize("n", [3, 4, 8, 13, 64, 1000])
def test_the_rank_that_differs_is_named_for_any_flipped_bit(n: int) -> None:
    for rank in {0, 1, n // 2, n - 2, n - 1}:
        for bit in range(16):
            values = [0x5A5A] * n
            values[rank] ^= 1 << bit
            assert differing(n, [sums_of(values)]) == [rank]


def test_two_ranks_cannot_tell_which_one_is_wrong() -> None:
    assert differing(2, [sums_of([7, 6])]) == [0, 1]
    assert differing(2, [sums_of([7, 7])]) == []


def test_if_several_replicas_differ_all_are_suspect() -> None:
    assert differing(4, [sums_of([7, 6, 5, 7])]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 7, 4096])
def test_every_flipped_bit_changes_the_checksum(dtype: torch.dtype, n: int) -> None:
    torch.manual_seed(n)
    t = torch.randn(n).to(dtype)
    before = checksum([t], t.device).item()
    data = t.view(torch.uint8)
    for place in {0, data.numel() // 2, data.numel() - 1}:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum([t], t.device).item() != before
            data[place] ^= 1 << bit
    assert checksum([t], t.device).item() == before


def test_the_checksum_does_not_depend_on_order_splits_or_strides() -> None:
    t = torch.randn(6, 8)
    whole = checksum([t], t.device)
    assert whole == checksum([t[3:], t[:3]], t.device) == checksum([t.T], t.device)
    assert whole == checksum([t.flip(0), torch.empty(0)], t.device)
    odd = torch.randn(9).bfloat16()
    assert checksum([odd[1:]], t.device) == checksum([odd[1:].clone()], t.device)


def test_integers_are_part_of_the_checksum() -> None:
    t = torch.arange(5)
    both = checksum([t, torch.ones(2), t.to(torch.int8)], t.device)
    assert int(both) == 20 + 2 * 0x3F800000


class Codes(Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Codes:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def test_weights_that_wrap_other_tensors_are_refused() -> None:
    codes = Codes(torch.ones(3, dtype=torch.int8))
    with pytest.raises(
        TypeError, match=r"reads the memory of weights.*Codes.*remove 'replica_drift'"
    ):
        checksum([torch.ones(2), codes], codes.device)
