"""Counts over replicas that differ are the same on all ranks, and at least those of each rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fastguard
from fastguard import GuardedOptimizer, Replicated, StepRecord
from guardtest.ranks import Ranks, collectives
from guardtest.spreads import parameter

NAN, INF = math.nan, math.inf


def plain(values: torch.Tensor) -> tuple[list[nn.Parameter], Any]:
    return [parameter(values), parameter(torch.ones(2))], Replicated(dist.group.WORLD)


def beside_shards(values: torch.Tensor) -> tuple[list[nn.Parameter], Any]:
    """Plain tensors in a model with DTensors count as replicated."""
    shard = parameter(DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (4,)), [Shard(0)]))
    return [parameter(values), shard], None


def replicated(values: torch.Tensor) -> tuple[list[nn.Parameter], Any]:
    mesh = init_device_mesh("cpu", (4,))
    copy = DTensor.from_local(values, mesh, [Replicate()], run_check=False)
    return [parameter(copy), parameter(torch.ones(2))], None


KINDS: dict[str, Callable[..., tuple[list[nn.Parameter], Any]]] = {
    "plain": plain, "beside_shards": beside_shards, "replicated": replicated
}  # fmt: skip


def bad_values(bad: Sequence[Sequence[float]]) -> torch.Tensor:
    values = torch.ones(16)
    mine = bad[dist.get_rank()]
    values[: len(mine)] = torch.tensor(mine)
    return values


def skipped(kind: str, bad: Sequence[Sequence[float]]) -> tuple[StepRecord, StepRecord, list[str]]:
    """Returns the records of a bad and a good step, and the collectives of the good step."""
    params, group = KINDS[kind](bad_values(bad))
    opt = GuardedOptimizer(
        torch.optim.SGD(params, lr=0.1),
        named_parameters=[("weight", params[0]), ("other", params[1])],
        group=group,
    )
    opt.step()
    params[0].grad = torch.ones_like(params[0].grad)
    with collectives() as seen:
        opt.step()
    first, second = opt.records()
    return first, second, [name for name, _ in seen]


BAD = {
    "two of four alike": ([NAN] * 12, [NAN] * 12, [], []),
    "one of four": ([], [], [NAN] * 3, []),
    "of different numbers": ([NAN] * 12, [NAN] * 4, [], [NAN]),
    "of different kinds": ([NAN, INF, INF], [-INF] * 2, [], [INF]),
    "all alike": ([NAN] * 5,) * 4,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD)
def test_records_count_the_worst_copy(four: Ranks, case: str, kind: str) -> None:
    bad = BAD[case]
    worst = tuple(
        max(sum(test(x) for x in mine) for mine in bad)
        for test in (math.isnan, lambda x: x == INF, lambda x: x == -INF)
    )
    n_bad = sum(bool(mine) for mine in bad)
    for mine, (record, good, seen) in zip(bad, four.run(skipped, kind, bad), strict=True):
        assert (record.action, record.nan, record.posinf, record.neginf) == ("skipped", *worst)
        assert record.culprit_ranks == n_bad
        for _, nan, posinf, neginf in record.culprits:
            assert nan <= record.nan and posinf <= record.posinf and neginf <= record.neginf
        assert len(record.culprits) == bool(mine)
        assert good.action == "applied" and (good.nan, good.posinf, good.neginf) == (0, 0, 0)
        assert seen == ["allreduce_"]  # only bad steps need a second collective


def raised(bad: Sequence[Sequence[float]]) -> tuple[str, str, list[float]]:
    """Returns the errors of a function and of the guard, and the counts of `measure_grads`."""
    params, group = plain(bad_values(bad))
    named = [("weight", params[0]), ("other", params[1])]
    opt = GuardedOptimizer(
        torch.optim.SGD(params, lr=0.1), named_parameters=named, nonfinite="raise", group=group
    )
    errors = []
    for attempt in (
        lambda: fastguard.clip_grad_norm_(named, 1.0, nonfinite="raise", group=group),
        opt.step,
    ):
        with pytest.raises(fastguard.NonFiniteGradError) as error:
            attempt()
        errors.append(str(error.value))
    return *errors, fastguard.measure_grads(named, group=group).segment_counts.sum(1).tolist()


def test_errors_count_each_nonfinite_element_once(four: Ranks) -> None:
    bad = BAD["two of four alike"]
    for mine, (*errors, counts) in zip(bad, four.run(raised, bad), strict=True):
        assert counts == [12, 0, 0]
        for error in errors:
            assert "(12 NaN, 0 +Inf, 0 -Inf) in" in error
            assert ("weight (12 NaN)" if mine else "parameters of 2 ranks") in error


def by_tensor(bad: Sequence[Sequence[float]]) -> list[list[float]]:
    params, group = plain(bad_values(bad))
    params[1].grad[0] = (NAN, 1.0, NAN, 1.0)[dist.get_rank()]
    stats = fastguard.measure_grads(params, per_tensor=True, group=group)
    return stats.segment_counts.tolist()


def test_each_segment_has_its_own_count(four: Ranks) -> None:
    counts = [[12.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert four.run(by_tensor, BAD["of different numbers"]) == [counts] * 4


def where_the_host_may_not_look(bad: Sequence[Sequence[float]]) -> list[float]:
    """On a GPU there is no second collective, and each rank reports at least its own counts."""
    from fastguard.ranks.team import Team

    Team.meets_on_host = property(lambda self: False)
    params, group = plain(bad_values(bad))
    with collectives() as seen:
        counts = fastguard.measure_grads(params, group=group).segment_counts.sum(1).tolist()
    assert [name for name, _ in seen] == ["allreduce_"]
    return counts


def test_without_host_communication_each_rank_counts_its_own() -> None:
    with Ranks(4) as ranks:  # new processes, because the function changes their code permanently
        found = ranks.run(where_the_host_may_not_look, BAD["of different numbers"])
    assert found == [[12, 0, 0], [5, 0, 0], [5, 0, 0], [5, 0, 0]]  # the mean would be 17/4
