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

    gloo's threads need the GIL to release what a finished collective held (torch 2.13). A group
    that is destroyed at once can hang for good, because its destructor joins those threads while it
    holds the GIL. A process that exits at once can abort, because a thread that asks an interpreter
    in shutdown for the GIL is ended in the middle of C++. Sleeping gives them the GIL.
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
