"""Uploads of numbers to a GPU do not wait, and can be part of a graph."""

import math

import pytest
import torch

from fastguard.gradients.transfer import numbers_on

CUDA = torch.device("cuda", 0)
LISTS = [(), (0.5,), (1.0, math.inf, -2.0), tuple(float(i) for i in range(5000))]


@pytest.mark.parametrize("values", LISTS, ids=lambda values: str(len(values)))
def test_numbers_arrive_without_waiting(no_sync, values):
    numbers_on(values, CUDA)
    with no_sync():
        found = numbers_on(values, CUDA)
        torch.cuda.synchronize()  # its pinned memory is free again
        torch.cuda._sleep(400_000_000)
        asleep = torch.cuda.Event()
        asleep.record()
        late = numbers_on(values, CUDA)
        assert not asleep.query(), "the host waited for the device"
    assert found.tolist() == late.tolist() == list(values)


@pytest.mark.parametrize("values", LISTS[1:3], ids=lambda values: str(len(values)))
def test_a_graph_uploads_numbers_at_each_replay(values):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = numbers_on(values, CUDA)
    for _ in range(2):
        found.zero_()
        graph.replay()
        assert found.tolist() == list(values)


def test_indices_and_switches():
    assert numbers_on([3, 1], CUDA, torch.int64).tolist() == [3, 1]
    assert numbers_on([True, False], CUDA, torch.bool).tolist() == [True, False]
