"""The helper that runs functions on several ranks reports their errors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from guardtest.ranks import Ranks, collectives


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, collective_seconds=3.0) as ranks:
        yield ranks


def sum_of_ranks(offset: int) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total)


def test_a_function_runs_on_every_rank_of_one_group(two: Ranks) -> None:
    assert two.run(sum_of_ranks, 10) == [21, 21]


def pid() -> int:
    return os.getpid()


def test_the_processes_are_reused(two: Ranks) -> None:
    assert two.run(pid) == two.run(pid)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("what went wrong on this rank")
    dist.barrier()


def test_an_error_of_one_rank_is_shown_and_the_group_is_recreated(two: Ranks) -> None:
    with pytest.raises(pytest.fail.Exception, match="what went wrong on this rank"):
        two.run(fail_on, 1)
    assert two.run(sum_of_ranks, 0) == [1, 1]


def die(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_the_death_of_a_rank_is_reported(two: Ranks) -> None:
    survivor, dead = two.outcomes(die, 1)
    assert dead.exitcode == -signal.SIGKILL
    assert survivor.error is not None and "RuntimeError" in survivor.error


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def test_a_silent_rank_is_named(two: Ranks) -> None:
    two.run(pid)
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[1\] did not answer"):
        two.run(sleep_on, 1, timeout=0.5)


def what_is_seen() -> list[tuple[str, int]]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with collectives() as seen:
        dist.all_reduce(torch.ones(3))
        x.full_tensor()
    return seen


def test_collectives_of_both_kinds_are_counted(two: Ranks) -> None:
    for seen in two.run(what_is_seen):
        assert seen == [("allreduce_", 12), ("all_gather_into_tensor", 8)]
