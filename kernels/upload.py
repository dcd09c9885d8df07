"""Uploads small tables to a device without a sync.

Uploads use pinned memory. A copy from other memory blocks until the driver has read that memory,
and cannot be captured in a CUDA graph. Any stream may read an upload, after its kernels have been
ordered after the copy (`await_on_stream`). While a graph is captured, the copy becomes a part of
the graph and is repeated at each replay. The source of the copy is therefore kept, and only the
graph uses the destination.

It is unknown when a graph is deleted, so all memory that the graph reads is kept forever. This
takes little memory: tables that were uploaded before are kept once for all graphs, and the sources
of tables that graphs upload are kept once per content. Capturing the same step again keeps nothing
more.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastguard.kernels.launch import raw_stream_of

ALIGNMENT = 16  # bytes; alignment of tables in the spare memory
SPARE_TABLES = 4  # tables of the largest size so far; a graph has one table per bucket and stage


@dataclass(slots=True, eq=False)
class Upload:
    """A table on its device.

    Attributes:
        memory: The numbers.
        buffers: Other memory that kernels use together with the numbers.
        source: Source of the upload in the replays of a graph; None if no graph uploads.
        event: On a GPU, the event recorded after the upload; None if a graph uploads.
        streams: Addresses of the streams that are ordered after the upload.
    """

    memory: Tensor
    buffers: tuple[Tensor, ...] = ()
    source: Tensor | None = None
    event: torch.cuda.Event | None = None
    streams: set[int] = field(default_factory=set)

    @property
    def is_lasting(self) -> bool:
        """Whether later steps may use the table; a table of a graph exists only in replays."""
        return self.source is None

    def await_on_stream(self) -> None:
        """Orders the current stream of a GPU after the upload, without blocking the host."""
        if self.event is None:
            return
        if torch.cuda.is_current_stream_capturing():
            # torch.cuda.graph syncs before it captures, so the upload has finished.
            _kept[id(self)] = self
            return
        device = self.memory.device
        address = raw_stream_of()(device.index)
        if address in self.streams:
            return
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self.event)
        for tensor in (self.memory, *self.buffers):
            tensor.record_stream(stream)
        self.streams.add(address)


_kept: dict[int, Upload] = {}  # by identity, earlier uploads that a graph may read
_sources: dict[bytes, Tensor] = {}  # by content, the sources of uploads by graphs
_spare = torch.from_numpy(np.empty(0, np.uint8))  # a placeholder until the first upload
_lock = threading.Lock()  # for the spare memory, of which two graphs must not get the same part


def upload(numbers: np.ndarray, device: torch.device, buffers: tuple[Tensor, ...] = ()) -> Upload:
    """Starts an upload on the current stream of a device; on a CPU nothing is copied.

    Args:
        numbers: The table, int64 or float64.
        device: The destination.
        buffers: See `Upload`.
    """
    if device.type == "cpu":
        return Upload(torch.from_numpy(numbers), buffers)
    if torch.cuda.is_current_stream_capturing():
        source = _source_for_graphs(numbers)
        # The destination belongs to the graph, like every temporary tensor created during capture.
        return Upload(source.to(device, non_blocking=True), buffers, source)
    source = _filled(_pinned_now(numbers.nbytes), numbers)
    memory = source.to(device, non_blocking=True)
    stream = torch.cuda.current_stream(device)
    return Upload(memory, buffers, None, stream.record_event(), {stream.cuda_stream})


def _source_for_graphs(numbers: np.ndarray) -> Tensor:
    """Returns pinned memory with these numbers that is kept forever."""
    content = numbers.dtype.str.encode() + repr(numbers.shape).encode() + numbers.tobytes()
    source = _sources.get(content)
    if source is None:
        source = _sources[content] = _filled(_pinned_before(numbers.nbytes), numbers)
    return source


def _filled(pinned: Tensor, numbers: np.ndarray) -> Tensor:
    source = pinned.view(torch.from_numpy(numbers).dtype).view(numbers.shape)
    source.numpy()[...] = numbers
    return source


def _pinned_now(n_bytes: int) -> Tensor:
    """Returns pinned memory for one upload; torch reuses it only after the copy has run."""
    global _spare
    with _lock:
        if _spare.numel() < n_bytes:
            _spare = _pinned(SPARE_TABLES * _rounded(n_bytes))
    return _pinned(n_bytes)


def _pinned_before(n_bytes: int) -> Tensor:
    """Returns pinned memory for an upload by a graph, from the spare if possible.

    A new allocation from the driver may abort the capture, so it is the last resort.
    """
    global _spare
    with _lock:
        if _spare.numel() >= n_bytes:
            taken, _spare = _spare[:n_bytes], _spare[_rounded(n_bytes) :]
            return taken
    return _pinned(n_bytes)


def _pinned(n_bytes: int) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
