"""LossMeter: a NaN batch does not make the mean of the epoch NaN, and is reported."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastguard
from fastguard.records import loss_meter
from fastguard.records.loss_meter import KEPT_BAD, BadBatch, LossMeter
from guardtest.gloo_groups import end_groups

NAN, INF = math.nan, math.inf


def filled(*losses: float, **kwargs: float) -> LossMeter:
    meter = LossMeter()
    for i, loss in enumerate(losses):
        meter.update(torch.tensor(loss), tag=f"b{i}", **kwargs)
    return meter


def test_the_meter_averages_the_finite_losses_where_the_plain_mean_is_nan():
    losses = [1.0, NAN, 2.0, INF, -INF, 6.0]
    assert math.isnan(torch.tensor(losses).mean().item())
    summary = filled(*losses).compute()
    assert summary.mean == 3.0
    assert (summary.finite, summary.nonfinite) == ({"loss": 3}, {"loss": 3})
    assert [(b.index, b.tag) for b in summary.bad] == [(1, "b1"), (3, "b3"), (4, "b4")]


def test_weights_count_samples():
    meter = LossMeter()
    meter.update(torch.tensor(1.0), weight=1)
    meter.update(torch.tensor(4.0), weight=torch.tensor(2))
    meter.update(torch.tensor(NAN), weight=100)
    summary = meter.compute()
    assert summary.mean == 3.0
    assert summary.weights == {"loss": 3.0}


def test_each_named_loss_is_checked_alone_and_may_be_missing():
    meter = LossMeter()
    meter.update({"seg": torch.tensor(1.0), "contour": torch.tensor(NAN)}, tag=(0, 7))
    meter.update({"seg": torch.tensor(3.0)})
    meter.update({"contour": 0.5, "seg": INF})
    summary = meter.compute()
    assert summary.means == {"seg": 2.0, "contour": 0.5}
    assert summary.bad == (BadBatch(0, ("contour",), (0, 7)), BadBatch(2, ("seg",)))
    assert str(summary).splitlines() == [
        "seg: 2 (mean of 2 batches, 1 not finite)",
        "contour: 0.5 (mean of 1 batches, 1 not finite)",
        "not finite in batch 0 (tag (0, 7)): contour; batch 2: seg",
    ]


@pytest.mark.parametrize(
    "meter, says",
    [
        (LossMeter(), "no loss was passed"),
        (filled(NAN, NAN), "loss: no valid batch (2 seen, all not finite)"),
        (filled(1.0, weight=0.0), "loss: no valid batch (1 seen, all of weight 0)"),
    ],
    ids=["nothing", "all-bad", "no-weight"],
)
def test_without_a_valid_batch_there_is_no_mean_and_the_text_says_so(meter, says):
    assert meter.compute().mean is None
    assert str(meter).startswith(says)


def test_zero_weight_does_not_hide_an_infinite_loss():
    assert filled(INF, weight=0.0).compute().nonfinite == {"loss": 1}


def test_a_bad_weight_tensor_makes_the_batch_bad():
    meter = LossMeter()
    meter.update(torch.tensor(1.0), weight=torch.tensor(-1.0))
    meter.update(torch.tensor(1.0), weight=torch.tensor(NAN))
    assert meter.compute().nonfinite == {"loss": 2}


@pytest.mark.parametrize("weight", [-1.0, NAN, INF])
def test_a_bad_weight_is_an_error(weight):
    with pytest.raises(ValueError, match="finite number >= 0"):
        LossMeter().update(1.0, weight=weight)


@pytest.mark.parametrize("weight", ["3", True, None])
def test_a_weight_that_is_not_a_number_is_an_error(weight):
    with pytest.raises(TypeError, match="weight"):
        LossMeter().update(1.0, weight=weight)


def test_a_loss_per_sample_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match=r"reduce it first"):
        LossMeter().update(torch.ones(3))


def test_memory_stays_bounded_when_every_batch_is_bad():
    meter = filled(*[NAN] * (KEPT_BAD + 500))
    summary = meter.compute()
    assert [b.index for b in summary.bad] == list(range(KEPT_BAD))
    assert summary.nonfinite == {"loss": KEPT_BAD + 500}
    assert len(meter._bad) == KEPT_BAD


def test_reset_starts_at_batch_0():
    meter = filled(1.0, NAN)
    meter.reset()
    meter.update(torch.tensor(NAN))
    assert [b.index for b in meter.compute().bad] == [0]


def test_a_resumed_meter_equals_an_uninterrupted_one(tmp_path: Path):
    whole, first = filled(1.0, NAN, 5.0, INF), filled(1.0, NAN)
    torch.save(first.state_dict(), tmp_path / "meter.pt")
    second = LossMeter()
    second.load_state_dict(torch.load(tmp_path / "meter.pt", weights_only=True))
    second.update(torch.tensor(5.0), tag="b2")
    second.update(torch.tensor(INF), tag="b3")
    assert second.compute() == whole.compute()


def test_no_graph_is_kept():
    parameter = torch.ones((), requires_grad=True)
    meter = LossMeter()
    meter.update(parameter * 2, weight=parameter)
    assert meter.compute().mean == 2.0


@pytest.mark.parametrize("n", [5, 23])
def test_losses_on_a_device_wait_in_rows_and_count_the_same(monkeypatch, n):
    """Simulates a GPU on the host, with rows, several transfers, and a name that appears later."""
    rows = LossMeter()
    direct = LossMeter()
    for i in range(n):
        loss = {"a": torch.tensor(NAN if i % 5 == 3 else float(i))}
        if i > 2:
            loss["b"] = torch.tensor(INF if i == 6 else 1.0, dtype=torch.bfloat16)
        weight = torch.tensor(1 + i % 3) if i % 2 else 2.0
        with monkeypatch.context() as patched:
            patched.setattr(loss_meter, "ROWS", 4)
            patched.setattr(loss_meter, "_gpu_of", lambda values: torch.device("cpu"))
            rows.update(loss, weight, tag=i)
            if i == 9:
                rows.compute()  # in the middle of a row
        direct.update(loss, weight, tag=i)
    assert rows.compute() == direct.compute()


def _rank(rank: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    meter = LossMeter()
    for i in range(3 + rank):
        meter.update({"seg": torch.tensor(NAN if (rank, i) == (1, 2) else 1.0 + rank)}, tag=i)
    if rank == 1:
        meter.update({"contour": torch.tensor(NAN)})
    before = meter.compute()
    joint = meter.all_reduce()
    assert meter.all_reduce() == joint  # nothing is counted twice
    assert meter.compute() == before
    torch.save([joint.means, joint.nonfinite, joint.batches, str(joint.bad)], f"{results}/{rank}")
    end_groups()


def test_all_ranks_get_the_means_of_all(tmp_path: Path):
    args = (str(tmp_path / "store"), str(tmp_path))
    mp.start_processes(_rank, args, nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first == second
    means, nonfinite, batches, bad = first
    assert means == {"seg": (3 * 1.0 + 3 * 2.0) / 6, "contour": None}
    assert (nonfinite, batches) == ({"seg": 1, "contour": 1}, 8)
    assert "rank=1" in bad and "tag=2" in bad


def test_the_meter_is_public():
    assert fastguard.LossMeter is LossMeter
