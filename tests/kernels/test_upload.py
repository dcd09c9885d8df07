"""Uploads to a simulated GPU use pinned memory, which is kept until streams have read it."""

import numpy as np
import pytest
import torch

from fastguard.kernels import upload
from fastguard.stages import triton as triton_stages
from fastguard.stages.spike_rules import Threshold

CUDA = torch.device("cuda", 0)


class Event:
    pass


class Stream:
    """Creates events, and records the events it waits for."""

    def __init__(self, address):
        self.cuda_stream, self.waited = address, []

    def record_event(self):
        return Event()

    def wait_event(self, event):
        self.waited.append(event)


class OnDevice(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""

    device = CUDA

    def record_stream(self, stream):
        stream.recorded = True


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU with a settable current stream and capture; pinned memory is ordinary."""

    class Gpu:
        stream, capturing, pinned = Stream(1), False, []

    def pinned(n_bytes):
        Gpu.pinned.append(n_bytes)
        return torch.empty(n_bytes, dtype=torch.uint8)

    Gpu.pinned = []
    monkeypatch.setattr(upload, "_pinned", pinned)
    monkeypatch.setattr(upload, "_spare", torch.empty(0, dtype=torch.uint8))
    monkeypatch.setattr(upload, "_kept", {})
    monkeypatch.setattr(upload, "_sources", {})
    monkeypatch.setattr(upload, "raw_stream_of", lambda: lambda index: Gpu.stream.cuda_stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Gpu.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Gpu.stream)
    copy = torch.Tensor.to

    def to(self, device, **options):
        return copy(self, "cpu", copy=True).as_subclass(OnDevice)

    monkeypatch.setattr(torch.Tensor, "to", to)
    return Gpu


def numbers(n=3):
    return np.arange(float(n))


def test_each_stream_waits_for_an_upload_once(gpu):
    first, second = gpu.stream, Stream(2)
    made = upload.upload(numbers(), CUDA)
    assert made.memory.tolist() == [0.0, 1.0, 2.0] and made.is_lasting
    made.await_on_stream()
    assert not first.waited  # the stream of the upload itself
    gpu.stream = second
    for _ in range(2):
        made.await_on_stream()
    assert second.waited == [made.event] and second.recorded


def test_a_graph_uploads_from_memory_that_was_pinned_before(gpu):
    upload.upload(numbers(), CUDA)
    before = len(gpu.pinned)
    gpu.capturing = True
    made = [upload.upload(numbers() + i, CUDA) for i in range(upload.SPARE_TABLES)]
    assert len(gpu.pinned) == before
    for i, one in enumerate(made):
        assert one.source.tolist() == [i, i + 1.0, i + 2.0] and not one.is_lasting
        one.await_on_stream()
    assert all(any(s is m.source for s in upload._sources.values()) for m in made)
    upload.upload(numbers() + 99, CUDA)  # the spare buffer is in use, so this allocates a new one
    assert len(gpu.pinned) == before + 1


def test_memory_that_a_graph_reads_is_kept(gpu):
    made = upload.upload(numbers(), CUDA)
    gpu.capturing = True
    for _ in range(2):
        made.await_on_stream()
    assert list(upload._kept.values()) == [made] and made.is_lasting


def test_capturing_again_keeps_nothing_more(gpu):
    """For example, a loop may capture its step every hour for a month."""
    upload.upload(numbers(), CUDA)
    gpu.capturing = True
    made = [upload.upload(numbers(), CUDA) for _ in range(50)]
    assert len(upload._sources) == 1 and not upload._kept
    assert all(one.source is made[0].source for one in made)
    upload.upload(numbers().astype(np.int64), CUDA)  # other numbers of the same size
    assert len(upload._sources) == 2


def test_rules_uploaded_by_a_graph_are_not_used_by_other_steps(gpu, monkeypatch):
    monkeypatch.setattr(triton_stages, "_rule_tables", {})
    arguments = ((Threshold(max=7.0),), ("grad_norm",), (), CUDA)
    gpu.capturing = True
    captured = triton_stages._rule_table(*arguments)
    gpu.capturing = False
    first = triton_stages._rule_table(*arguments)
    assert first is not captured and triton_stages._rule_table(*arguments) is first
    assert first.shape == (1, 8) and first[0, 3] == 7.0


def test_rule_tables_are_bounded(monkeypatch):
    monkeypatch.setattr(triton_stages, "_rule_tables", {})
    for i in range(triton_stages.RULE_TABLES + 5):
        triton_stages._rule_table(
            (Threshold(max=1.0 + i),), ("grad_norm",), (), torch.device("cpu")
        )
    assert len(triton_stages._rule_tables) == triton_stages.RULE_TABLES
