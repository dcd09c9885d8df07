"""`watch="replica_drift"` over ranks detects a flipped bit and names its rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastguard import GuardedOptimizer
from guardtest.rank_guards import net, replicated, same_on_all
from guardtest.ranks import Ranks

STEPS, AT, CULPRIT = 6, 3, 2


def flip_one_bit(t: Tensor, bit: int = 0) -> None:
    """Flips a bit of the last element, by default the lowest of its mantissa."""
    t.detach().view(torch.int32).view(-1)[-1] ^= 1 << bit


def drifting(
    place: str, every: int = 1, bit: int = 0, **options: Any
) -> list[tuple[str | None, str, Any]]:
    """Returns reason, action and suspects of each step; a bit flips before step `AT`."""
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


def test_different_optimizer_state_is_detected_after_it_has_changed_a_weight(four: Ranks) -> None:
    steps = same_on_all(four.run(drifting, "state"))
    assert steps[:AT] == [FINE] * AT
    suspects = {"gradients": [], "weights": [CULPRIT]}
    assert steps[AT] == ("replica_drift", "applied", suspects)


def test_drift_persists_so_that_a_later_check_finds_it(four: Ranks) -> None:
    """Steps 1 and 5 are watched, and the bit flips in a gradient of step 3."""
    steps = same_on_all(four.run(drifting, "gradient", 4, 22))
    assert [suspects for _, _, suspects in steps] == [
        {"gradients": [], "weights": []},
        *[None] * 3,
        {"gradients": [], "weights": [CULPRIT]},
        None,
    ]


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
