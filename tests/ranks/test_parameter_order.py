"""Replicas must hold their parameters in the same order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fastguard
from fastguard import GuardedOptimizer
from guardtest.rank_guards import guard_over, parameters
from guardtest.ranks import Ranks, collectives
from guardtest.spreads import on, parameter

SHAPES = {"a": (2,), "b": (3,), "c": (2,), "d": (2, 1)}


def ordered(
    by_rank: Sequence[str], named: Sequence[bool], scope: str, spread: str
) -> tuple[str, list[float]]:
    """Returns the error of the first step, or the coefficients by parameter.

    Args:
        by_rank: The letters of each rank's parameters, with blanks between param groups.
        named: Whether each rank passes names.
        scope: `clip_scope`.
        spread: `"replicated"` plain tensors, or `"sharded"` DTensors.
    """
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    made = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        grad = torch.full(shape, 10.0**i)
        made[name] = parameter(grad) if spread == "replicated" else on(mesh, grad, Shard(0))
    groups = [{"params": [made[name] for name in letters]} for letters in by_rank[rank].split()]
    opt = GuardedOptimizer(
        torch.optim.SGD(groups, lr=0.0),
        max_norm=1.0,
        clip_scope=scope,
        named_parameters=made.items() if named[rank] else None,
        group=fastguard.Replicated(dist.group.WORLD) if spread == "replicated" else None,
    )
    try:
        opt.step()
    except ValueError as error:
        return str(error), []
    return "", opt.last.clip_coef.tolist()


BOTH = (True, True)


MISPLACED = {
    "tensor": (
        ("abc", "bac"), BOTH, "tensor",
        "parameter 0 is 'a' of shape (2,) on rank 0, 'b' of shape (3,) on rank 1",
    ),
    "tensors of one shape": (
        ("abc", "cba"), BOTH, "tensor",
        "parameter 0 is 'a' of shape (2,) on rank 0, 'c' of shape (2,) on rank 1",
    ),
    "without names": (
        ("abd", "adb"), (False, False), "tensor",
        "parameter 1 is of shape (3,) on rank 0, of shape (2, 1) on rank 1",
    ),
    "names on one rank": (
        ("abd", "adb"), (True, False), "tensor",
        "parameter 1 is of shape (3,) on rank 0, of shape (2, 1) on rank 1",
    ),
    "param groups exchanged": (
        ("ab cd", "cd ab"), BOTH, "group",
        "a parameter of param group 0 is 'a' of shape (2,) on rank 0, 'c' of shape (2,) on rank 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spread", ["replicated", "sharded"])
@pytest.mark.parametrize("case", MISPLACED)
def test_another_order_of_parameters_is_an_error(two: Ranks, case: str, spread: str) -> None:
    *arguments, expected = MISPLACED[case]
    for message, _ in two.run(ordered, *arguments, spread):
        assert expected in message


def unnamed(
    by_rank: Sequence[str],
    groups: Sequence[int],
    scope: str,
    *,
    bad: bool = False,
    drift: int = 0,
    size: int = 2,
) -> tuple[str, list[float]]:
    """Returns the error of the first step of equal shapes without names, or the coefficients.

    Args:
        by_rank: The order of the parameters of each rank.
        groups: The number of parameters in each param group.
        scope: `clip_scope`.
        bad: Whether the first gradient of rank 1 is NaN.
        drift: How many weights of rank 1 differ from those of rank 0.
        size: The number of elements of each parameter, all equal.
    """
    rank = dist.get_rank()
    made = {}
    for i, letter in enumerate("abc"):
        made[letter] = parameter(torch.full((size,), 10.0**i))
        made[letter].data.fill_(0.0 if letter == "c" else float(i))
    for letter in "abc"[: drift * rank]:
        made[letter].data += 0.5
    if bad and rank == 1:
        made["a"].grad[0] = math.nan
    order = iter([made[letter] for letter in by_rank[rank]])
    opt = GuardedOptimizer(
        torch.optim.SGD([{"params": [next(order) for _ in range(n)]} for n in groups], lr=0.0),
        max_norm=1.0,
        clip_scope=scope,
        group=fastguard.Replicated(dist.group.WORLD),
    )
    try:
        opt.step()
    except ValueError as error:
        return str(error), []
    return "", opt.last.clip_coef.tolist()


@pytest.mark.parametrize(
    "options", [{}, {"bad": True}, {"drift": 2}, {"size": 8192}], ids=["", "bad", "drift", "large"]
)
def test_replicas_of_one_shape_without_names_are_distinguished(two: Ranks, options: dict) -> None:
    if options.get("bad"):  # the gradients differ, and "a" and "c" have the same weights
        by_rank = ("abc", "bac")
    else:
        by_rank = ("abc", "cba")
    for message, _ in two.run(unnamed, by_rank, [3], "tensor", **options):
        assert f"parameter 0 is of shape ({options.get('size', 2)},) (checksum of" in message


def test_groups_of_replicas_without_names_are_distinguished(two: Ranks) -> None:
    for message, _ in two.run(unnamed, ("abc", "cab"), [1, 2], "group"):
        assert "a parameter of param group 0 is of shape (2,) (checksum of" in message
    for order in ("abc", "acb"):
        assert two.run(unnamed, ("abc", order), [1, 2], "group")[1][0] == ""


@pytest.mark.parametrize(
    "options", [{}, {"bad": True}, {"drift": 3}, {"bad": True, "drift": 1}], ids=str
)
def test_replicas_with_different_values_have_the_same_order(two: Ranks, options: dict) -> None:
    """Drift and bad gradients are not reported as a different order."""
    for message, coefficients in two.run(unnamed, ("abc", "abc"), [3], "tensor", **options):
        assert message == "" and len(coefficients) == 3


def sparse_without_names() -> str:
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    opt = GuardedOptimizer(
        torch.optim.SGD([p], lr=1.0),
        max_norm=1.0,
        clip_scope="tensor",
        group=fastguard.Replicated(dist.group.WORLD),
    )
    with pytest.raises(TypeError) as error:
        opt.step()
    return str(error.value)


def test_sparse_gradients_without_names_get_their_own_error(two: Ranks) -> None:
    for message in two.run(sparse_without_names):
        assert "sparse" in message


IN_PLACE = {
    "the same order": (("abcd", "abcd"), BOTH, "tensor"),
    "the same order, names on one rank": (("abcd", "abcd"), (False, True), "tensor"),
    "the same order without names": (("abcd", "abcd"), (False, False), "tensor"),
    "another order within groups": (("ab cd", "ba dc"), BOTH, "group"),
    "another order for one coefficient": (("abcd", "dcba"), BOTH, "global"),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_an_order_that_changes_no_coefficient_is_accepted(two: Ranks, case: str) -> None:
    first, second = two.run(ordered, *IN_PLACE[case], "replicated")
    assert first == second
    assert first[0] == "" and min(first[1]) < 1.0


def order_of_stages() -> str:
    """The ranks of a process group hold different tensors, so nothing is compared."""
    opt = guard_over("plain", ((1, 2), (2, 1))[dist.get_rank()], clip_scope="group", max_norm=1.0)
    opt.step()
    return str(opt.records()[0].action)


def test_stages_may_hold_different_parameters(two: Ranks) -> None:
    assert two.run(order_of_stages) == ["clipped"] * 2


def added_later(scope: str, swapped: bool) -> tuple[list[list[str]], str]:
    """Returns the collectives of four steps between which parameters are added, and the error."""
    rank = dist.get_rank()
    first = parameters(1)
    opt = GuardedOptimizer(
        torch.optim.SGD([("first", first[0])], lr=1.0),
        max_norm=1.0,
        clip_scope=scope,
        group=fastguard.Replicated(dist.group.WORLD),
    )
    calls, said = [], ""
    for step in range(4):
        if step == 2:
            joining = list(zip("ab", parameters(2), strict=True))
            for named in joining[:: -1 if swapped and rank == 1 else 1]:
                opt.add_param_group({"params": [named]})
        with collectives() as seen:
            try:
                opt.step()
            except ValueError as error:
                said = str(error)
        calls.append([name for name, _ in seen])
    return calls, said


@pytest.mark.parametrize("scope", ["tensor", "group"])
def test_added_parameters_are_compared_once(two: Ranks, scope: str) -> None:
    once = ["allreduce_", "allreduce_"]
    for calls, said in two.run(added_later, scope, False):
        assert calls == [once, once[1:], once, once[1:]] and said == ""
    for _, said in two.run(added_later, scope, True):
        assert "'a' of shape (2,) on rank 0, 'b' of shape (2,) on rank 1" in said


def test_with_one_segment_the_order_does_not_matter(two: Ranks) -> None:
    for calls, said in two.run(added_later, "global", True):
        assert [len(each) for each in calls] == [2, 1, 1, 1] and said == ""
