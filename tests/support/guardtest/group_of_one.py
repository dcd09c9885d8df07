"""A process group of this process alone, which ends without hanging."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

MOMENT = 0.05  # seconds in which gloo's threads let go of a finished collective


_destroy = dist.destroy_process_group


def unhurried_end() -> None:
    """Ends the groups of this process, a moment after the last collective.

    gloo's threads take the GIL to let go of what a finished collective held, and the destructor of
    the group joins them while it holds the GIL (torch 2.13): a group that ends right behind a
    collective hangs now and then, for ever. Sleeping gives them the GIL.
    """
    time.sleep(MOMENT)
    _destroy()


@contextmanager
def group_of_one() -> Iterator[None]:
    """A gloo group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        unhurried_end()
