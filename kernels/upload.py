"""Tables of a few numbers on their way from the host to a device. The host waits for nothing.

They travel from pinned memory: a copy from any other returns when the driver has read it, and a
CUDA graph cannot hold one. An upload may be read on any stream, whose kernels then come after it.
While a graph is captured the copy is a part of the graph, which repeats it at each replay: its
source stays where it is, and what it fills is for the graph alone.

No graph says when it ends, so that what it reads is kept for good. It is little: tables that were
uploaded before (each of them once, however many graphs read it), and the sources of those that a
graph uploads itself, each different content once. Capturing the same step again keeps nothing more.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastguard.kernels.launch import raw_stream_of

ALIGNMENT = 16  # bytes, of a table in the spare memory
SPARE_TABLES = 4  # as large as the largest so far: a graph has one for each bucket and stage


@dataclass(slots=True, eq=False)
class Upload:
    """One table on its device.

    Attributes:
        memory: The numbers.
        buffers: Other memory that kernels use together with them.
        source: What the replays of a graph upload from; None if no graph uploads.
        event: On a GPU, the event behind the upload; None if a graph uploads.
        streams: The addresses of the streams whose kernels come after it.
    """

    memory: Tensor
    buffers: tuple[Tensor, ...] = ()
    source: Tensor | None = None
    event: torch.cuda.Event | None = None
    streams: set[int] = field(default_factory=set)

    @property
    def is_lasting(self) -> bool:
        """Whether later steps may use it: what a graph uploads is not there before it runs."""
        return self.source is None

    def await_on_stream(self) -> None:
        """Makes the current stream of a GPU come after the upload. The host goes on."""
        if self.event is None:
            return
        if torch.cuda.is_current_stream_capturing():
            # torch.cuda.graph waits for the device before it captures: the upload is over.
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


_kept: dict[int, Upload] = {}  # by identity: what was uploaded before and a graph may read
_sources: dict[bytes, Tensor] = {}  # by content: what graphs upload; memory of theirs is filled
_spare = torch.from_numpy(np.empty(0, np.uint8))  # plain, whatever mode the import runs under
_lock = threading.Lock()  # around the spare: no two graphs may get the same part of it


def upload(numbers: np.ndarray, device: torch.device, buffers: tuple[Tensor, ...] = ()) -> Upload:
    """Starts an upload on the current stream of a device; on a CPU there is nothing to do.

    Args:
        numbers: int64 or float64.
        device: Where they go.
        buffers: See `Upload`.
    """
    if device.type == "cpu":
        return Upload(torch.from_numpy(numbers), buffers)
    if torch.cuda.is_current_stream_capturing():
        source = _source_for_graphs(numbers)
        # What it fills belongs to the graph, like every temporary that a capture makes.
        return Upload(source.to(device, non_blocking=True), buffers, source)
    source = _filled(_pinned_now(numbers.nbytes), numbers)
    memory = source.to(device, non_blocking=True)
    stream = torch.cuda.current_stream(device)
    return Upload(memory, buffers, None, stream.record_event(), {stream.cuda_stream})


def _source_for_graphs(numbers: np.ndarray) -> Tensor:
    """Pinned memory with these numbers that stays for good."""
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
    """Pinned memory for one upload: torch hands it out again only after the copy ran."""
    global _spare
    with _lock:
        if _spare.numel() < n_bytes:
            _spare = _pinned(SPARE_TABLES * _rounded(n_bytes))
    return _pinned(n_bytes)


def _pinned_before(n_bytes: int) -> Tensor:
    """Pinned memory for an upload by a graph, out of the spare.

    An allocator that asks the driver for memory can end the capture; so that comes last.
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
