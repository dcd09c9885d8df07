"""The functions over ranks give the results of one process for any distribution of the model."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fastguard
from guardtest.ranks import Ranks, collectives
from guardtest.spreads import (
    SHAPES,
    SPREADS,
    fsdp,
    model_gradients,
    on,
    parameter,
    with_plain_tensors,
)

NORMS = (2.0, 1.0, 3.5, math.inf)


# On the ranks.


def whole(t: Tensor | None) -> Tensor | None:
    return t.full_tensor() if isinstance(t, DTensor) else t


def measured(name: str) -> dict[float, tuple[bytes, tuple[float, ...]]]:
    """Returns the bits of the norm and the values of the segment, by p."""
    found = {}
    for p in NORMS:
        parts, group = SPREADS[name](model_gradients())
        stats = fastguard.measure_grads([q for _, q in parts], norm_type=p, group=group)
        assert type(stats.total_norm) is Tensor
        found[p] = (stats.total_norm64.numpy().tobytes(), stats.total_norm64.item())
    return found


@pytest.mark.parametrize("name", SPREADS)
def test_every_element_of_the_model_counts_once(four: Ranks, name: str) -> None:
    for p in NORMS:
        params = [parameter(g) for g in model_gradients()]
        truth = fastguard.measure_grads(params, norm_type=p).total_norm64.item()
        results = [r[p] for r in four.run(measured, name)]
        assert len({bits for bits, _ in results}) == 1
        assert results[0][1] == pytest.approx(truth, rel=1e-13)


def clipped(name: str, p: float, max_norm: float) -> tuple[bytes, dict[int, Tensor]]:
    """Returns the norm, and the full gradients afterward."""
    parts, group = SPREADS[name](model_gradients())
    norm = fastguard.clip_grad_norm_([q for _, q in parts], max_norm, p, group=group)
    assert type(norm) is Tensor and norm.dtype is torch.float32
    return norm.numpy().tobytes(), {i: whole(q.grad) for i, q in parts if q.grad is not None}


@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("name", SPREADS)
def test_clipping_equals_that_of_one_process(four: Ranks, name: str, p: float) -> None:
    params = [parameter(g) for g in model_gradients()]
    norm = fastguard.clip_grad_norm_(params, 0.5, p)
    results = four.run(clipped, name, p, 0.5)
    assert {bits for bits, _ in results} == {norm.numpy().tobytes()}
    seen: set[int] = set()
    for _, grads in results:
        for i, grad in grads.items():
            torch.testing.assert_close(grad, params[i].grad, rtol=2e-7, atol=0)
            seen.add(i)
    assert seen == set(range(len(SHAPES)))


def bad_on_one_rank(name: str, rank: int) -> tuple[list[int], list[str], float]:
    """Puts a NaN and two Infs on one rank; returns counts, local culprits and norm."""
    parts, group = SPREADS[name](model_gradients())
    named = [(f"tensor {i}", p) for i, p in parts]
    if dist.get_rank() == rank:
        local = next(
            t for t in (getattr(p.grad, "_local_tensor", p.grad) for _, p in parts) if t.numel() > 2
        )
        local.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    stats = fastguard.measure_grads(named, group=group)
    counts = stats.segment_counts.sum(1).tolist()
    return counts, [culprit for culprit, *_ in stats.culprits()], stats.total_norm.item()


@pytest.mark.parametrize("name", [n for n in SPREADS if n not in ("partial", "frozen_elsewhere")])
def test_tensors_of_one_rank_count_on_all_ranks(four: Ranks, name: str) -> None:
    results = four.run(bad_on_one_rank, name, 1)
    assert [counts for counts, _, _ in results] == [[1, 1, 1]] * 4  # four replicas count as one
    assert [bool(culprits) for _, culprits, _ in results] == [False, True, False, False]
    assert len({norm for *_, norm in results}) == 1


def raised(name: str) -> str:
    """Returns the error on this rank if one rank has a NaN; nothing is changed."""
    parts, group = SPREADS[name](model_gradients())
    if dist.get_rank() == 0:
        parts[0][1].grad.view(-1)[0] = math.nan
    before = [p.grad.clone() for _, p in parts]
    named = [(f"tensor {i}", p) for i, p in parts]
    with pytest.raises(fastguard.NonFiniteGradError) as caught:
        fastguard.clip_grad_norm_(named, 1e-3, nonfinite="raise", group=group)
    for (_, p), old in zip(parts, before, strict=True):
        torch.testing.assert_close(p.grad, old, rtol=0, atol=0, equal_nan=True)
    return str(caught.value)


def test_all_ranks_raise_and_one_names_the_parameter(four: Ranks) -> None:
    first, *others = four.run(raised, "pipeline")
    assert "(1 NaN, 0 +Inf, 0 -Inf) in tensor 0 (1 NaN)" in first
    for other in others:
        assert "(1 NaN, 0 +Inf, 0 -Inf) in parameters of rank 0" in other


def exchanged(name: str, p: float) -> list[tuple[str, int]]:
    parts, group = SPREADS[name](model_gradients())
    params = [q for _, q in parts]
    fastguard.clip_grad_norm_(params, 1.0, p, group=group)  # creates the process groups once
    with collectives() as seen:
        fastguard.clip_grad_norm_(params, 1.0, p, group=group)
    return seen


@pytest.mark.parametrize("name", [n for n in SPREADS if n != "partial"])
def test_one_collective_of_56_bytes(four: Ranks, name: str) -> None:
    assert four.run(exchanged, name, 2.0) == [[("allreduce_", 56)]] * 4


def test_an_inf_norm_adds_a_maximum_of_8_bytes(four: Ranks) -> None:
    assert four.run(exchanged, "hsdp", math.inf) == [[("allreduce_", 56), ("allreduce_", 8)]] * 4


def elementwise(name: str) -> tuple[dict[int, Tensor], dict[int, Tensor], list[float]]:
    """Returns clamped gradients, cleaned gradients, and the counts before cleaning."""
    parts, group = SPREADS[name](model_gradients())
    fastguard.clip_grad_value_([p for _, p in parts], 0.25)
    clamped = {i: whole(p.grad) for i, p in parts}
    parts, group = SPREADS[name](model_gradients())
    if dist.get_rank() == 1:
        next(iter(parts))[1].grad._local_tensor.view(-1)[0] = math.inf
    counts = fastguard.sanitize_grads_([p for _, p in parts], posinf=9.0, group=group)
    return clamped, {i: whole(p.grad) for i, p in parts}, counts.segment_counts.sum(1).tolist()


@pytest.mark.parametrize("name", ["fsdp", "partial"])
def test_clamping_and_cleaning(four: Ranks, name: str) -> None:
    truth = model_gradients()
    for clamped, cleaned, counts in four.run(elementwise, name):
        for i, grad in enumerate(truth):
            torch.testing.assert_close(clamped[i], grad.clamp(-0.25, 0.25), rtol=0, atol=0)
        if name == "fsdp":
            assert counts == [0, 1, 0]
            assert cleaned[0].flatten()[6] == 9.0  # rank 1 holds rows 2 and 3


def per_tensor() -> tuple[list[float], str]:
    parts, _ = with_plain_tensors(model_gradients())
    stats = fastguard.measure_grads([p for _, p in parts], per_tensor=True)
    with pytest.raises(ValueError, match="per_tensor=True") as error:
        fastguard.measure_grads([], per_tensor=True, group=dist.group.WORLD)
    return stats.segment_norms.tolist(), str(error.value)


def test_norms_of_each_tensor_across_shards(four: Ranks) -> None:
    truth = [grad.double().norm().item() for grad in model_gradients()]
    for norms, error in four.run(per_tensor):
        assert norms == pytest.approx(truth, rel=1e-13)
        assert "hold different tensors" in error


# Models on which torch raises an error, is slow, or is wrong.


def torch_and_ours(name: str) -> tuple[str, float]:
    parts, group = SPREADS[name](model_gradients())
    params = [p for _, p in parts]
    with pytest.raises(Exception) as error:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
    return str(error.value), fastguard.clip_grad_norm_(params, 1.0, group=group).item()


@pytest.mark.parametrize("name", ["with_plain_tensors", "two_meshes"])
def test_models_on_which_torch_raises(four: Ranks, name: str) -> None:
    truth = torch.cat([g.flatten() for g in model_gradients()]).double().norm().item()
    for error, norm in four.run(torch_and_ours, name):
        assert "DTensor" in error or "mesh" in error
        assert norm == pytest.approx(truth, rel=1e-7)


def lazy_norm() -> tuple[float, float]:
    """Clips by a partial norm of shards; returns our norm afterward."""
    parts, _ = fsdp(model_gradients()[:1])
    grads = [p.grad for _, p in parts]
    theirs = torch.linalg.vector_norm(grads[0])
    fastguard.clip_grads_with_norm_([p for _, p in parts], 0.5, theirs)
    return theirs._local_tensor.item(), fastguard.get_total_norm(grads).item()


def test_a_lazy_norm_is_joined_first(four: Ranks) -> None:
    truth = model_gradients()[0].norm().item()
    for local, after in four.run(lazy_norm):
        assert local < 0.9 * truth
        assert after == pytest.approx(0.5, rel=1e-5)


def bf16_over_stages() -> tuple[float, float]:
    """Each stage has 4096 ones in bfloat16, so the norm is 128."""
    p = parameter(torch.ones(4096, dtype=torch.bfloat16) * (1 + dist.get_rank() / 64))
    group = dist.group.WORLD
    square = torch.nn.utils.get_total_norm([p.grad]).square()
    dist.all_reduce(square)  # as pipeline trainers do
    return square.sqrt().item(), fastguard.clip_grad_norm_([p], math.inf, group=group).item()


def test_a_bf16_norm_over_stages_has_seven_digits(four: Ranks) -> None:
    truth = math.sqrt(sum(4096 * (1 + rank / 64) ** 2 for rank in range(4)))
    for recipe, ours in four.run(bf16_over_stages):
        assert abs(recipe / truth - 1) > 1e-4
        assert ours == pytest.approx(truth, rel=1e-7)


def many_adapters(n: int) -> tuple[float, float, float]:
    mesh = init_device_mesh("cpu", (4,))
    local = torch.full((1, 2), 0.5)
    params = [nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)])) for _ in range(n)]
    for p in params:
        p.grad = DTensor.from_local(local.clone(), mesh, [Shard(0)])
    start = time.perf_counter()
    theirs = torch.nn.utils.get_total_norm([p.grad for p in params[: n // 25]]).full_tensor()
    theirs_s = 25 * (time.perf_counter() - start)
    start = time.perf_counter()
    norm = fastguard.clip_grad_norm_(params, 1e6)
    return theirs_s, time.perf_counter() - start, norm.item() / (theirs.item() * 5)


def test_thousands_of_adapters_take_a_fraction_of_the_time_of_torchs_norm(four: Ranks) -> None:
    for theirs, ours, ratio in four.run(many_adapters, 4_000):
        assert ours < theirs / 3
        assert ratio == pytest.approx(1.0, rel=1e-6)


# Arguments that are refused.


def refused() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    halves = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    apart = on(halves[dist.get_rank() // 2], torch.ones(4), Shard(0))
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    foreign = pairs[1 - dist.get_rank() % 2]
    tries = [
        lambda: fastguard.clip_grad_norm_([], 1.0, group=mesh),
        lambda: fastguard.clip_grad_norm_([], 1.0, group=foreign),
        lambda: fastguard.clip_grad_norm_([apart], 1.0, group=pairs[dist.get_rank() % 2]),
        lambda: fastguard.FlatGradBuckets([apart]),
    ]
    errors = []
    for attempt in tries:
        with pytest.raises((TypeError, ValueError)) as error:
            attempt()
        errors.append(str(error.value))
    return errors


def test_invalid_groups_are_an_error_on_every_rank(four: Ranks) -> None:
    for mesh, foreign, apart, flat in four.run(refused):
        assert "pass mesh.get_group() with the intended dimension" in mesh
        assert "this rank is not a member" in foreign
        assert "no group contains both" in apart
        assert "flat buckets support only plain tensors" in flat
