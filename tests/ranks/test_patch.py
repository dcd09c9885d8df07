"""`patch_torch()` in trainers that call only torch's functions, and what these functions return."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

import fastguard
from fastguard.ranks import team
from guardtest.ranks import Ranks
from guardtest.spreads import SPREADS, model_gradients, on, parameter


def clip_of_a_pipeline(
    params: list[nn.Parameter], max_norm: float, pp: DeviceMesh | None
) -> Tensor:
    """Clips like a trainer that combines the norms of its pipeline stages itself."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in params], 2.0, False, None)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pp is not None:
        norm = norm**2
        dist.all_reduce(norm, group=pp.get_group())
        norm = norm**0.5
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm, None)
    return norm


def pipeline_step(patched: bool) -> tuple[float, Tensor, list[str]]:
    team._warned_of.clear()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    p = on(mesh["dp"], torch.full((4,), (3.0, 4.0)[mesh.get_local_rank("pp")]), Shard(0))
    said: list[str] = []
    logging.getLogger("fastguard").addFilter(lambda r: said.append(r.getMessage()) or True)
    if patched:
        with fastguard.patch_torch():
            norm = clip_of_a_pipeline([p], 1.0, mesh["pp"])
    else:
        norm = clip_of_a_pipeline([p], 1.0, mesh["pp"])
    logging.getLogger("fastguard").filters.clear()
    return norm.item(), p.grad.full_tensor(), said


def test_a_trainer_that_combines_the_norms_of_its_stages_gets_torchs_result(four: Ranks) -> None:
    theirs, ours = four.run(pipeline_step, False), four.run(pipeline_step, True)
    for (norm, grad, said), (expected, its_grad, _) in zip(ours, theirs, strict=True):
        assert norm == pytest.approx(expected, rel=1e-6) == 10.0
        torch.testing.assert_close(grad, its_grad)
        assert said == []  # there is no warning, because a trainer cannot pass group=


def clamped_on_a_stage(partial: bool) -> tuple[list[float], list[str]]:
    team._warned_of.clear()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    p = on(mesh["dp"], torch.tensor([3.0, -4.0]), Shard(0))
    if partial:
        summand = torch.tensor([2.0, -0.1])
        p.grad = DTensor.from_local(summand, mesh["dp"], [Partial()], run_check=False)
    said: list[str] = []
    logging.getLogger("fastguard").addFilter(lambda r: said.append(r.getMessage()) or True)
    with fastguard.patch_torch():
        torch.nn.utils.clip_grad_value_([p], 1.0)
    logging.getLogger("fastguard").filters.clear()
    return p.grad.full_tensor().tolist(), said


def test_clamping_needs_no_communication_and_no_group(four: Ranks) -> None:
    assert four.run(clamped_on_a_stage, False) == [([1.0, -1.0], [])] * 4
    for clamped, said in four.run(clamped_on_a_stage, True):  # the sum is clamped, not its summands
        assert clamped == pytest.approx([1.0, -0.2]) and said == []


def experts_apart() -> tuple[float, float]:
    """Gets the norms of experts and of other parameters; a stage without experts passes `[]`."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
    dense = [on(mesh["fsdp"], torch.ones(4), Shard(0))]
    last = mesh.get_local_rank("pp") == 1
    experts = [on(mesh["fsdp"], torch.full((4, 4), 2.0), Shard(0))] if last else []
    with fastguard.patch_torch():
        of_experts = torch.nn.utils.get_total_norm([p.grad for p in experts])
        if isinstance(of_experts, DTensor):
            of_experts = of_experts.full_tensor()
        of_the_rest = torch.nn.utils.get_total_norm([p.grad for p in dense]).full_tensor()
    return of_experts.item(), of_the_rest.item()


def test_a_trainer_can_get_the_norm_of_its_experts_separately(four: Ranks) -> None:
    assert four.run(experts_apart, timeout=15.0) == [(0.0, 2.0)] * 2 + [(8.0, 2.0)] * 2


def returned(name: str) -> list[tuple[bool, float, float]]:
    """Returns for each function: whether the norm is a DTensor, the norm, and its `full_tensor`."""
    parts, _ = SPREADS[name](model_gradients())
    params = [p for _, p in parts]
    found = []
    with fastguard.patch_torch():
        for norm in (
            torch.nn.utils.clip_grad_norm_(params, 1e6),
            torch.nn.utils.clip_grad_norm_(iter(params), 1e6),
            torch.nn.utils.get_total_norm([p.grad for p in params]),
            torch.nn.utils.clip_grad._get_total_norm(p.grad for p in params),
        ):
            whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
            found.append((isinstance(norm, DTensor), norm.item(), whole.item()))
            torch.nn.utils.clip_grads_with_norm_(params, 1e6, norm)
    return found


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "both_dimensions", "with_plain_tensors", "ddp"])
def test_the_norm_is_a_dtensor_if_torchs_norm_is_one(four: Ranks, name: str) -> None:
    truth = torch.cat([g.flatten() for g in model_gradients()]).double().norm().item()
    for found in four.run(returned, name):
        for is_dtensor, held, whole in found:
            assert is_dtensor == (name != "ddp")
            assert held == whole == pytest.approx(truth, rel=1e-6)


def used_as_torchs(patched: bool) -> list[float]:
    """Logs, compares and computes with a norm, like callers of torch."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(4, 6))
    model(torch.ones(2, 4)).square().sum().backward()
    params = list(model.parameters())
    patch = fastguard.patch_torch() if patched else torch.no_grad()
    with patch:
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm=0.5, foreach=True)
    assert type(norm) is DTensor and norm.device_mesh == params[0].device_mesh
    whole = norm.full_tensor()
    after = torch.cat([p.grad.full_tensor().flatten() for p in params]).norm()
    return [whole.item(), float(whole), (norm * 2).full_tensor().item(), after.item()]


def test_the_norm_can_be_used_like_torchs(four: Ranks) -> None:
    for ours, theirs in zip(
        four.run(used_as_torchs, True), four.run(used_as_torchs, False), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-5)


def our_own() -> list[bool]:
    """Our own functions return plain tensors, with and without the patch."""
    parts, _ = SPREADS["fsdp"](model_gradients())
    params = [p for _, p in parts]
    with fastguard.patch_torch():
        norms = [fastguard.clip_grad_norm_(params, 1.0)]
    norms.append(fastguard.get_total_norm([p.grad for p in params]))
    return [type(norm) is Tensor for norm in norms]


def test_our_norm_is_a_plain_tensor(four: Ranks) -> None:
    assert four.run(our_own) == [[True, True]] * 4


def without_gradients() -> list[bool]:
    mesh = init_device_mesh("cpu", (4,))
    p = on(mesh, torch.ones(4), Shard(0))
    p.grad = None
    with fastguard.patch_torch():
        norms = [
            torch.nn.utils.clip_grad_norm_([p], 1.0),
            torch.nn.utils.clip_grad_norm_([], 1.0),
            torch.nn.utils.get_total_norm([]),
        ]
    return [type(norm) is Tensor and norm.item() == 0.0 for norm in norms]


def test_without_gradients_the_norm_is_a_plain_tensor_as_in_torch(four: Ranks) -> None:
    assert four.run(without_gradients) == [[True] * 3] * 4


def with_our_keywords() -> tuple[float, str]:
    """Code that knows of the patch can still pass `group`."""
    p = parameter(torch.full((4,), 1.0 + dist.get_rank()))
    p.grad[0] = math.nan
    with fastguard.patch_torch():
        norm = torch.nn.utils.clip_grad_norm_(
            [("w", p)], 1.0, nonfinite="zero", group=dist.group.WORLD
        )
        with pytest.raises(RuntimeError) as error:
            torch.nn.utils.get_total_norm([torch.tensor([math.nan])], error_if_nonfinite=True)
    return norm.item(), str(error.value)


def test_our_keywords_are_accepted(four: Ranks) -> None:
    for norm, error in four.run(with_our_keywords):
        assert norm == pytest.approx(math.sqrt(3 * (1 + 4 + 9 + 16)), rel=1e-6)
        assert "NaN" in error
