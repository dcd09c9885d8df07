"""Losses over ranks have names, may be on all ranks or one, and need a group."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastguard
from fastguard import GuardedOptimizer, NonFiniteGradError, SpikeRule, Threshold
from guardtest.rank_guards import rank, same_on_all, sgd, weight
from guardtest.ranks import Ranks, collectives

NAN = math.nan


def mean_and_nan() -> list[Any]:
    """Uses losses 1 and 3 on the two ranks, then NaN on one."""
    p = weight(1.0)
    opt = sgd(p, group=fastguard.Replicated(dist.group.WORLD))
    opt.step(loss=torch.tensor(1.0 + 2 * rank()))
    after_first = p.item()
    opt.step(loss=torch.tensor(NAN if rank() == 1 else 1.0))
    assert p.item() == after_first
    return [(r.action, r.reason, repr(r.losses), r.culprit_rank) for r in opt.records()]


def test_losses_are_averaged_and_one_nan_skips_everywhere(two: Ranks) -> None:
    first, second = same_on_all(two.run(mean_and_nan))
    assert first == ("applied", None, "{'loss': 2.0}", None)
    assert second == ("skipped", "nonfinite_loss", "{'loss': nan}", 1)


def losses_by_rank() -> list[dict[str, float]]:
    """Uses losses that only one rank has, in changing order, or that are missing in a step."""
    opt = sgd(weight(1.0))
    given = [
        [{"seg": 1.0, "det": 4.0}, {"det": 2.0}],
        [None, {"late": 7.0}],
        [{"seg": 3.0}, {"late": 1.0, "seg": 5.0}],
        [None, None],
    ]
    for losses in given:
        opt.step(loss=losses[rank()])
    return [dict(sorted(r.losses.items())) for r in opt.records()]


def test_a_loss_can_be_known_to_some_ranks_only(two: Ranks) -> None:
    assert same_on_all(two.run(losses_by_rank)) == [
        {"det": 3.0, "seg": 1.0},
        {"late": 7.0},
        {"late": 1.0, "seg": 4.0},
        {},
    ]


def rule_without_the_loss() -> list[tuple[str, str | None, tuple[str, ...]]]:
    """Only rank 1 has the loss of the rule, like the last stage of a pipeline."""
    rules = {"ce": SpikeRule(window=8, warmup=3, sigma=3.0), "aux": Threshold(max=5.0)}
    opt = sgd(weight(1.0), spike=rules)
    for loss in (1.0, 1.1, 0.9, 50.0, 1.0):
        opt.step(loss={"ce": loss, "aux": 1.0} if rank() == 1 else None)
    return [(r.action, r.reason, r.spikes) for r in opt.records()]


def test_a_rule_applies_on_ranks_without_its_loss(two: Ranks) -> None:
    *_, spike, last = same_on_all(two.run(rule_without_the_loss))
    assert spike == ("skipped", "loss_spike", ("ce",))
    assert last[0] == "applied"


@pytest.fixture
def fresh(two: Ranks) -> Iterator[Ranks]:
    """Loss names belong to a group, so the ranks form a new group before and after a test."""
    two.kill()
    yield two
    two.kill()


OWN_NAMES = [f"part {i}" for i in range(11)]


def a_loss_too_many() -> list[Any]:
    """Rank 1 has thirteen losses, two too many; one of these is NaN in the third step."""
    p = weight(1.0)
    opt = sgd(p)
    for late in (2.0, 4.0, NAN, 6.0):
        mine = dict.fromkeys(OWN_NAMES, 1.0) | {"late": late, "later": 10.0}
        opt.step(loss=mine if rank() == 1 else {"part 0": 3.0})
    said = [
        (r.action, r.reason, r.losses["part 0"], r.losses["other losses"], len(r.losses))
        for r in opt.records()
    ]
    return [repr(said), p.item()]


def test_losses_beyond_the_positions_share_one_and_no_rank_waits(fresh: Ranks) -> None:
    said, moved = same_on_all(fresh.run(a_loss_too_many))
    assert said == repr(
        [
            ("applied", None, 2.0, 12.0, 12),
            ("applied", None, 2.0, 14.0, 12),
            ("skipped", "nonfinite_loss", 2.0, NAN, 12),
            ("applied", None, 2.0, 16.0, 12),
        ]
    )
    assert moved == -3.0


def late_losses_of_both() -> tuple[list[dict[str, float]], list[str]]:
    """Each rank has its own late loss; one has the name of the shared position."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastguard").addHandler(handler)
    opt = sgd(weight(1.0))
    opt.step(loss=dict.fromkeys(OWN_NAMES, 1.0))
    opt.step(loss={f"of rank {rank()}": 1.0 + 2 * rank()})
    opt.step(loss={"other losses": 5.0} if rank() == 0 else None)
    logging.getLogger("fastguard").removeHandler(handler)
    return [r.losses for r in opt.records()][1:], warnings


def test_a_loss_beyond_the_positions_is_reported_once(fresh: Ranks) -> None:
    for i, (losses, warnings) in enumerate(fresh.run(late_losses_of_both)):
        assert losses == [{"other losses": 2.0}, {"other losses": 5.0}]
        (warning,) = warnings
        assert f"no position is left for loss 'of rank {i}'" in warning
        assert "combine at most 11 losses by name" in warning
        assert "To record losses by name" in warning


def raise_of_a_late_loss() -> str:
    opt = sgd(weight(1.0), nonfinite="raise")
    opt.step(loss=dict.fromkeys(OWN_NAMES, 1.0))
    with pytest.raises(NonFiniteGradError) as error:
        opt.step(loss={"late": NAN} if rank() == 1 else None)
    return str(error.value)


def test_a_late_loss_raises_on_all_ranks(fresh: Ranks) -> None:
    message = same_on_all(fresh.run(raise_of_a_late_loss))
    assert message == "the loss is non-finite: other losses=nan; nothing was changed"


def rule_of_a_late_loss() -> str:
    sgd(weight(1.0)).step(loss=dict.fromkeys(OWN_NAMES, 1.0) if rank() == 1 else None)
    with pytest.raises(ValueError) as error:
        sgd(weight(1.0), spike={"late": Threshold(max=5.0)})
    return str(error.value)


def test_a_rule_needs_its_own_position(fresh: Ranks) -> None:
    message = same_on_all(fresh.run(rule_of_a_late_loss))
    assert "no position is left for the rule on loss 'late'" in message


def loss_without_group() -> str:
    p = weight(1.0)
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=1.0))
    with pytest.raises(ValueError) as error:
        opt.step(loss=torch.tensor(1.0))
    assert p.item() == 0.0
    with collectives() as seen:
        opt.step()  # without a loss, plain tensors decide by themselves
    assert not seen and p.item() == -1.0
    return str(error.value)


def test_a_loss_on_one_of_several_ranks_needs_a_group(two: Ranks) -> None:
    for error in two.run(loss_without_group):
        assert "group=fastguard.Replicated(torch.distributed.group.WORLD)" in error
