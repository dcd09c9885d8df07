"""Gloo process groups that are destroyed without a hang or an abort."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

MOMENT = 0.05  # seconds in which gloo's threads release a finished collective


_destroy = dist.destroy_process_group


def end_groups() -> None:
    """Destroys all groups of this process, shortly after the last collective.

    gloo's threads need the GIL to release the memory of a finished collective (torch 2.13). A group
    that is destroyed immediately can hang, because its destructor joins these threads while it
    holds the GIL. A process that exits immediately can abort, because Python ends a thread that
    requests the GIL during shutdown, in the middle of C++ code. Sleeping lets the threads take the
    GIL.
    """
    time.sleep(MOMENT)
    if dist.is_initialized():
        _destroy()


@contextmanager
def group_of_one() -> Iterator[None]:
    """A gloo group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        end_groups()
