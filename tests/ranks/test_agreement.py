"""If ranks have different arguments, all raise an error before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from fastguard import GuardedOptimizer, SpikeRule, Threshold
from fastguard.ranks.agreement import _by_rank
from guardtest.rank_guards import guard_over
from guardtest.ranks import Ranks, collectives


def the_refusal(ranks: Ranks, group: str, by_rank: Sequence[dict[str, Any]]) -> str:
    """Returns the error of each attempt, which must be equal on all ranks."""
    (message,) = {m for said in ranks.run(refused, group, by_rank) for m in said}
    return message


def refused(group: Any, by_rank: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the errors of two attempts at the first step."""
    opt = guard_over(**({"group": group} | by_rank[dist.get_rank()]))
    said = []
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            opt.step(loss=1.0)
        said.append(str(error.value))
    assert not any(p.any() for g in opt.param_groups for p in g["params"]) and not opt.steps_taken
    return said


SPIKE = {"grad_norm": SpikeRule(window=8, warmup=4), "ce": Threshold(max=5.0)}

DIFFERENT = {
    "max_norm": ({"max_norm": 1.0}, {"max_norm": 2.5}, "max_norm is 1.0 on rank 0, 2.5 on rank 1"),
    "no max_norm": ({}, {"max_norm": 1.0}, "max_norm is None on rank 0, 1.0 on rank 1"),
    "nonfinite": (
        {"nonfinite": "raise"},
        {},
        "nonfinite is 'raise' on rank 0, 'skip' on rank 1",
    ),
    "norm_type": ({}, {"norm_type": math.inf}, "norm_type is 2.0 on rank 0, inf on rank 1"),
    "clip_scope": (
        {"counts": (1, 1)},
        {"counts": (1, 1), "clip_scope": "group"},
        "clip_scope is 'global' on rank 0, 'group' on rank 1; "
        "the number of param groups is None on rank 0, 2 on rank 1",
    ),
    "segments": (
        {"counts": (1, 1, 1), "clip_scope": "group"},
        {"counts": (1, 1), "clip_scope": "group"},
        "the number of param groups is 3 on rank 0, 2 on rank 1",
    ),
    "spike": ({"spike": SPIKE}, {"spike": SPIKE | {"ce": Threshold(max=6.0)}}, "Threshold(max=6.0"),
    "max_consecutive_skips": (
        {"max_consecutive_skips": 3},
        {},
        "max_consecutive_skips is 3 on rank 0, None on rank 1",
    ),
    "group": (
        {"group": "replicated"},
        {"group": "plain"},
        "group is 'Replicated' on rank 0, 'ProcessGroup' on rank 1",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_the_argument_and_its_values_are_named_on_all_ranks(two: Ranks, case: str) -> None:
    *by_rank, expected = DIFFERENT[case]
    message = the_refusal(two, "plain", by_rank)
    assert expected in message
    assert message.endswith("Construct GuardedOptimizer with the same arguments on every rank")


REPLICAS = {
    "parameters": (
        {"counts": (2, 3)},
        {"counts": (2, 2)},
        "the number of parameters by param group is [2, 3] on rank 0, [2, 2] on rank 1",
    ),
    "clip_value": ({}, {"clip_value": 1}, "clip_value by param group is [None] on rank 0, [1.0]"),
    "compile_step": (
        {"compile_step": True},
        {},
        "compile_step is True on rank 0, False on rank 1",
    ),
    "flat_parameters": (
        {},
        {"flat_parameters": True},
        "flat_parameters is False on rank 0, True on rank 1",
    ),
}


@pytest.mark.parametrize("case", REPLICAS)
def test_replicas_hold_the_same_tensors(two: Ranks, case: str) -> None:
    *by_rank, expected = REPLICAS[case]
    assert expected in the_refusal(two, "replicated", by_rank)


def partial() -> str:
    """Passes partial gradients, which must be summed over the ranks, in different numbers."""
    mesh = init_device_mesh("cpu", (2,))
    made = [
        nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
        for _ in range(2 - dist.get_rank())
    ]
    for p in made:
        p.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    opt = GuardedOptimizer(torch.optim.SGD(made, lr=0.1), max_norm=1.0)
    with pytest.raises(ValueError) as error:
        opt.step()
    return str(error.value)


def test_ranks_are_compared_before_their_partial_gradients_are_summed(two: Ranks) -> None:
    for message in two.run(partial):
        assert "the number of parameters by param group is [2] on rank 0, [1] on rank 1" in message


def stages() -> tuple[list[Any], float]:
    """A process group with different numbers of tensors per rank, and rules in different orders."""
    rank = dist.get_rank()
    spike = SPIKE if rank else dict(reversed(SPIKE.items()))
    counts = ((1, 2), (4,))[rank]
    opt = guard_over("plain", counts, clip_value=(None, 9.0)[rank], max_norm=1 + rank, spike=spike)
    # Arguments are compared at the first step, because a trainer may set them before.
    opt.max_norm = 1.0
    seen = []
    for _ in range(2):
        with collectives() as calls:
            opt.step(loss=1.0)
        seen.append(calls)
    return seen, opt.records()[0].total_norm


def test_arguments_that_may_differ_are_accepted_and_compared_once(two: Ranks) -> None:
    vector = ("allreduce_", 248)
    for seen, norm in two.run(stages):
        assert seen == [[("allreduce_", 208), vector], [vector]]
        assert norm == pytest.approx(math.sqrt(14))


def test_many_ranks_are_counted() -> None:
    values = ["1.0"] * 9 + ["2.0"] + [f"{i}.5" for i in range(8)]
    said = _by_rank("max_norm", values, range(100, 118))
    assert said.startswith(
        "max_norm is 1.0 on ranks 100, 101, 102, 103, 104, 105, 106, 107 and 1 more, "
        "2.0 on rank 109, 0.5 on rank 110"
    )
    assert said.endswith(" and 2 more")


# Parameters have another order on one rank.
