"""`GuardedOptimizer(watch=...)` over ranks: replica drift, noise scale, shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastguard import GuardedOptimizer, RankWatch, Replicated
from fastguard.guard.watch.replica_drift import _number_of, checksum, differing
from fastguard.stages.cpu import stages as cpu
from guardtest.rank_guards import same_on_all
from guardtest.ranks import Ranks, collectives

STEPS, AT, CULPRIT = 6, 3, 2


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


def flip_one_bit(t: Tensor, bit: int = 0) -> None:
    """Flips a bit of the last element, by default the lowest of its mantissa."""
    t.detach().view(torch.int32).view(-1)[-1] ^= 1 << bit


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def replicated(**options: Any) -> dict[str, Any]:
    assert dist.group.WORLD is not None
    options = {"watch": ("replica_drift",), "watch_every": 1} | options
    return {"group": Replicated(dist.group.WORLD), **options}


def drifting(
    place: str, every: int = 1, bit: int = 0, **options: Any
) -> list[tuple[str | None, str, Any]]:
    """Returns reason, action and suspects of each step; before step `AT` a bit flips on one
    rank."""
    model = DistributedDataParallel(net())
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    opt = GuardedOptimizer(inner, **replicated(watch_every=every, **options))
    weight = model.module[0].weight
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, STEPS + 1):
        opt.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        if step == AT and dist.get_rank() == CULPRIT:
            if place == "gradient":
                flip_one_bit(weight.grad, bit)
            elif place == "weight":
                flip_one_bit(weight)
            elif place == "state":
                flip_one_bit(opt.state[weight]["exp_avg"], bit=22)
        opt.step()
    return [(r.reason, r.action, r.watch.get("replica_drift")) for r in opt.records()]


FINE = (None, "applied", {"gradients": [], "weights": []})


def test_replicas_that_agree_are_not_reported(four: Ranks) -> None:
    assert same_on_all(four.run(drifting, "nowhere")) == [FINE] * STEPS


def test_one_flipped_bit_of_a_gradient_is_an_incident_of_its_step(four: Ranks) -> None:
    steps = same_on_all(four.run(drifting, "gradient"))
    assert steps[: AT - 1] == [FINE] * (AT - 1)
    suspects = {"gradients": [CULPRIT], "weights": []}
    assert steps[AT - 1] == ("replica_drift", "applied", suspects)


def test_one_flipped_bit_of_a_weight_is_an_incident_of_the_step_that_reads_it(
    four: Ranks,
) -> None:
    steps = same_on_all(four.run(drifting, "weight"))
    assert steps[: AT - 1] == [FINE] * (AT - 1)
    suspects = {"gradients": [], "weights": [CULPRIT]}
    assert steps[AT - 1] == ("replica_drift", "applied", suspects)
    assert all(reason == "replica_drift" for reason, _, _ in steps[AT - 1 :])


@pytest.mark.parametrize("flat", ["flat_buckets", "flat_parameters"])
@pytest.mark.parametrize("place", ["gradient", "weight", "state"])
def test_one_flipped_bit_in_a_flat_buffer(four: Ranks, place: str, flat: str) -> None:
    steps = same_on_all(four.run(drifting, place, **{flat: True}))
    later = place == "state"
    found = [step == FINE for step in steps[: AT + later]]
    assert found == [True] * (AT - 1 + later) + [False]
    what = "gradients" if place == "gradient" else "weights"
    suspects = {"gradients": [], "weights": []} | {what: [CULPRIT]}
    assert steps[AT - 1 + later] == ("replica_drift", "applied", suspects)


def test_optimizer_state_that_differs_is_seen_once_it_has_moved_a_weight(four: Ranks) -> None:
    steps = same_on_all(four.run(drifting, "state"))
    assert steps[:AT] == [FINE] * AT
    suspects = {"gradients": [], "weights": [CULPRIT]}
    assert steps[AT] == ("replica_drift", "applied", suspects)


def test_drift_persists_so_that_a_later_check_finds_it(four: Ranks) -> None:
    """Steps 1 and 5 are watched, the bit flips in a gradient of step 3."""
    steps = same_on_all(four.run(drifting, "gradient", 4, 22))
    assert [suspects for _, _, suspects in steps] == [
        {"gradients": [], "weights": []},
        *[None] * 3,
        {"gradients": [], "weights": [CULPRIT]},
        None,
    ]


def watched_by_default() -> list[set[str]]:
    """Returns what each step has read without `watch_every`."""
    model = DistributedDataParallel(net())
    options = replicated(watch=("replica_drift", "tensor_norms"), watch_every=None)
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), **options)
    for _ in range(3):
        opt.zero_grad()
        model(torch.ones(4, 6)).square().mean().backward()
        opt.step()
    return [set(record.watch) for record in opt.records()]


def test_drift_is_read_in_every_step_by_default_and_norms_in_every_100th(four: Ranks) -> None:
    drift = {"replica_drift"}
    norms = {"tensor_norms", "zero_share"}
    assert same_on_all(four.run(watched_by_default)) == [drift | norms, drift, drift]


def different_seeds() -> tuple[str | None, Any, str]:
    """A model that was not broadcast."""
    opt = GuardedOptimizer(
        torch.optim.SGD(net(seed=dist.get_rank()).parameters(), lr=0.1), **replicated()
    )
    opt.step()
    [record] = opt.records()
    return record.reason, record.watch["replica_drift"], str(record)


def test_a_forgotten_broadcast_is_found_at_the_first_step(four: Ranks) -> None:
    reason, suspects, line = same_on_all(four.run(different_seeds))
    assert reason == "replica_drift"
    assert suspects == {"gradients": [], "weights": [0, 1, 2, 3]}
    assert "the weights of 4 ranks differ" in line


def bytes_of_steps() -> list[list[tuple[str, int]]]:
    model = DistributedDataParallel(net())
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        **replicated(watch=("tensor_norms", "replica_drift", "noise_scale"), watch_every=2),
    )
    RankWatch(opt, model)
    seen_in_steps = []
    for _ in range(4):
        model(torch.ones(2, 6)).sum().backward()
        with collectives() as seen:
            opt.step()
        seen_in_steps.append(seen)
    return seen_in_steps


def test_a_watched_step_sends_more_numbers_in_the_same_collective(four: Ranks) -> None:
    """12 numbers for drift, one for the noise scale, none for norms of plain tensors."""
    watched, other = [("allreduce_", 248 + 8 * 13)], [("allreduce_", 248)]
    for steps in four.run(bytes_of_steps):
        assert steps == [[("allreduce_", 208), *watched], other, watched, other]


def bytes_of_shards(*watch: str) -> list[int]:
    """Returns the sizes of the collectives of a step with shards of four tensors."""
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = GuardedOptimizer(inner, watch=watch, watch_every=1)
    sizes: list[int] = []
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        with collectives() as seen:
            opt.step()
        sizes = [size for name, size in seen if name == "allreduce_"]
    return sizes


def test_watched_shards_send_16_bytes_per_tensor_and_2_kb_for_exponents(four: Ranks) -> None:
    [plain] = same_on_all(four.run(bytes_of_shards))
    assert same_on_all(four.run(bytes_of_shards, "tensor_norms")) == [plain + 16 * 4]
    assert same_on_all(four.run(bytes_of_shards, "underflow")) == [plain + 8 * 257]


def reads() -> list[int]:
    """Returns the number of buckets whose bits each step has read."""
    counts: list[int] = []
    model = DistributedDataParallel(net())
    options = replicated(watch=("replica_drift", "tensor_norms"), watch_every=None)
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), **options)
    actual = cpu.read_bits

    def counted(*given: Any) -> Tensor:
        counts[-1] += 1
        return actual(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "read_bits", counted)
        for _ in range(2):
            counts.append(0)
            model(torch.ones(4, 6)).square().mean().backward()
            opt.step()
    return counts


def test_norms_and_drift_read_the_gradients_once(four: Ranks) -> None:
    """The other read is that of the weights."""
    assert same_on_all(four.run(reads)) == [2, 2]


# The arithmetic of `differing`, for all pairs of a rank and a flipped bit.


def sums_of(values: list[int]) -> tuple[int, int, int]:
    n = range(len(values))
    return (
        sum(values),
        sum(c * c for c in values),
        sum(_number_of(i) * c for i, c in zip(n, values, strict=True)),
    )


@pytest.mark.parametrize("n", [3, 4, 8, 13, 64, 1000])
def test_the_rank_that_differs_is_named_for_any_flipped_bit(n: int) -> None:
    for rank in {0, 1, n // 2, n - 2, n - 1}:
        for bit in range(16):
            values = [0x5A5A] * n
            values[rank] ^= 1 << bit
            assert differing(n, [sums_of(values)]) == [rank]


def test_two_ranks_cannot_tell_which_one_is_wrong() -> None:
    assert differing(2, [sums_of([7, 6])]) == [0, 1]
    assert differing(2, [sums_of([7, 7])]) == []


def test_if_several_replicas_differ_all_are_suspect() -> None:
    assert differing(4, [sums_of([7, 6, 5, 7])]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 7, 4096])
def test_every_flipped_bit_changes_the_checksum(dtype: torch.dtype, n: int) -> None:
    torch.manual_seed(n)
    t = torch.randn(n).to(dtype)
    before = checksum([t], t.device).item()
    data = t.view(torch.uint8)
    for place in {0, data.numel() // 2, data.numel() - 1}:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum([t], t.device).item() != before
            data[place] ^= 1 << bit
    assert checksum([t], t.device).item() == before


def test_the_checksum_knows_neither_order_nor_cuts_nor_strides() -> None:
    t = torch.randn(6, 8)
    whole = checksum([t], t.device)
    assert whole == checksum([t[3:], t[:3]], t.device) == checksum([t.T], t.device)
    assert whole == checksum([t.flip(0), torch.empty(0)], t.device)
    odd = torch.randn(9).bfloat16()
    assert checksum([odd[1:]], t.device) == checksum([odd[1:].clone()], t.device)


def test_integers_are_part_of_the_checksum() -> None:
    t = torch.arange(5)
    both = checksum([t, torch.ones(2), t.to(torch.int8)], t.device)
    assert int(both) == 20 + 2 * 0x3F800000


class Codes(Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Codes:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def test_weights_that_wrap_other_tensors_are_refused() -> None:
    codes = Codes(torch.ones(3, dtype=torch.int8))
    with pytest.raises(TypeError, match=r"reads the memory of weights.*Codes.*leave it out"):
        checksum([torch.ones(2), codes], codes.device)


# Noise scale.


def noisy(scaled: bool) -> list[float | None]:
    """Returns a gradient of squared norm 4 with 64 elements, plus noise of variance 1 on each
    rank."""
    p = nn.Linear(64, 1, bias=False)
    nn.init.zeros_(p.weight)
    model = DistributedDataParallel(p)
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        **replicated(watch=("noise_scale",)),
    )
    RankWatch(opt, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(200):
        opt.zero_grad()
        x = 0.25 + torch.randn(1, 64, generator=generator)
        scaler.scale(model(x).sum()).backward()
        if scaled:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    return [r.watch.get("noise_scale") for r in opt.records()]


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_the_noise_scale_estimates_the_useful_batch_size(four: Ranks, scaled: bool) -> None:
    """tr(S) is 64 for the gradient of one rank, so 16 for four ranks; 16 / 4 = 4."""
    scales = same_on_all(four.run(noisy, scaled))
    late = [scale for scale in scales[50:] if scale is not None]
    assert len(late) > 140
    assert sum(late) / len(late) == pytest.approx(4.0, rel=0.25)


def noisy_in_two_runs(break_at: int | None) -> list[float | None]:
    """Returns the noise scale of 40 steps; from `break_at` on, by a new guard with the loaded
    state."""
    p = nn.Linear(64, 1, bias=False)
    nn.init.zeros_(p.weight)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def guarded() -> tuple[GuardedOptimizer, nn.Module]:
        model = DistributedDataParallel(p)
        opt = GuardedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), **replicated(watch=("noise_scale",))
        )
        RankWatch(opt, model)
        return opt, model

    (opt, model), told = guarded(), []
    for step in range(40):
        if step == break_at:
            told += opt.records()
            state = opt.state_dict()
            opt, model = guarded()
            opt.load_state_dict(state)
        opt.zero_grad()
        model(0.25 + torch.randn(1, 64, generator=generator)).sum().backward()
        opt.step()
    return [r.watch.get("noise_scale") for r in [*told, *opt.records()]]


def test_the_averages_of_the_noise_scale_are_part_of_the_state_dict(four: Ranks) -> None:
    through = same_on_all(four.run(noisy_in_two_runs, None))
    assert same_on_all(four.run(noisy_in_two_runs, 20)) == through
    assert len([scale for scale in through if scale is not None]) > 20


def sharded_noise() -> list[float | None]:
    """Like `noisy`, with a module sharded by FSDP2."""
    model = nn.Sequential(nn.Linear(64, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    mesh = init_device_mesh("cpu", (4,))
    # this dtype: see `fastguard.errors.versions.FSDP_MEANS_ON_CPU`
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        watch=("noise_scale",),
        watch_every=1,
    )
    RankWatch(opt, model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(200):
        opt.zero_grad()
        model(0.25 + torch.randn(1, 64, generator=generator)).sum().backward()
        opt.step()
    return [r.watch.get("noise_scale") for r in opt.records()]


def test_the_noise_scale_of_a_sharded_model(four: Ranks) -> None:
    scales = same_on_all(four.run(sharded_noise))
    late = [scale for scale in scales[50:] if scale is not None]
    assert len(late) > 140
    assert sum(late) / len(late) == pytest.approx(4.0, rel=0.25)


def without_rank_watch() -> str:
    model = DistributedDataParallel(net())
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), **replicated(watch=("noise_scale",))
    )
    try:
        opt.step()
    except ValueError as error:
        return str(error)
    return ""


def test_the_noise_scale_needs_a_rank_watch(four: Ranks) -> None:
    assert "create a fastguard.RankWatch(opt, model)" in same_on_all(four.run(without_rank_watch))


# Shards.


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (4,))
    shard = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
    said = []
    for parameter, options in (
        (shard, {"watch": ("replica_drift",)}),
        (nn.Parameter(torch.ones(2)), {"watch": ("replica_drift",), "group": dist.group.WORLD}),
        (nn.Parameter(torch.ones(2)), replicated(watch=("noise_scale",), norm_type=1.0)),
    ):
        try:
            GuardedOptimizer(torch.optim.SGD([parameter], lr=0.1), **options)
        except ValueError as error:
            said.append(str(error))
    return said


def test_settings_that_ranks_cannot_compare_are_an_error(four: Ranks) -> None:
    dtensors, distinct, p_norm = same_on_all(four.run(refusals))
    assert "some parameters are DTensors; leave it out" in dtensors
    assert "hold different tensors; pass group=fastguard.Replicated" in distinct
    assert "norm_type=1; use norm_type=2.0" in p_norm


def sharded_norms() -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the recorded norms of a sharded model with a plain parameter, and the true norms."""
    model = net()
    with torch.no_grad():
        model[0].weight[:2] = 0.0
    mesh = init_device_mesh("cpu", (4,))
    fully_shard(model, mesh=mesh)
    extra = nn.Parameter(torch.ones(3))
    named = [*model.named_parameters(), ("extra", extra)]
    opt = GuardedOptimizer(
        torch.optim.SGD([{"params": [p]} for _, p in named], lr=0.1),
        named_parameters=named,
        watch=("tensor_norms", "underflow"),
    )
    model(torch.ones(2, 6)).square().sum().backward()
    extra.grad = torch.tensor([0.0, 3.0, 4.0])
    grads = {name: p.grad for name, p in named}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    opt.step()
    norms = {name: torch.linalg.vector_norm(g).item() for name, g in whole.items()}
    return opt.flush()[0].watch, norms


def test_norms_of_shards_equal_those_of_the_whole_tensors(four: Ranks) -> None:
    told, norms = same_on_all(four.run(sharded_norms))
    assert told["tensor_norms"] == pytest.approx(norms, rel=1e-6)
    assert told["zero_share"]["extra"] == pytest.approx(1 / 3)
