"""Tensors as vectors: views where the memory has no gaps."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from fastguard.gradients.vectors import flat, in_memory_order


def dense_tensors() -> Iterator[torch.Tensor]:
    for shape in [(), (5,), (0, 3), (2, 1, 3), (2, 3, 4, 5)]:
        for order in itertools.permutations(range(len(shape))):
            yield torch.randn(shape).permute(order)
    yield torch.randn(6).as_strided((1, 6, 1), (7, 1, 9))  # unusual strides of single elements


@pytest.mark.parametrize("as_vector", [in_memory_order, flat])
def test_dense_tensors_become_views_in_memory_order(as_vector):
    for t in dense_tensors():
        vector = as_vector(t)
        assert vector.shape == (t.numel(),) and vector.is_contiguous()
        assert vector.data_ptr() == t.data_ptr()
        assert torch.equal(vector, t.as_strided((t.numel(),), (1,)))


def test_gaps_are_refused_or_left_out():
    gaps = torch.arange(12.0).view(3, 4)[:, :3].t()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        in_memory_order(gaps)
    assert flat(gaps).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
