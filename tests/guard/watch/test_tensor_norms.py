"""`watch=("tensor_norms",)` shows layers with growing or zero gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastguard import GuardedOptimizer, JsonLinesSink, read_records
from fastguard.guard.watch import quantity

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def guarded(grads: dict[str, Tensor], **options: Any) -> tuple[GuardedOptimizer, dict[str, Tensor]]:
    """Returns a guarded optimizer of parameters with these gradients, and the parameters."""
    named = {name: nn.Parameter(torch.ones_like(g)) for name, g in grads.items()}
    for name, grad in grads.items():
        named[name].grad = grad
    options.setdefault("watch", ("tensor_norms",))
    opt = GuardedOptimizer(
        torch.optim.SGD(named.values(), lr=0.0), named_parameters=named.items(), **options
    )
    return opt, named  # type: ignore[return-value]


def test_a_growing_layer_is_detected_before_the_global_norm_grows() -> None:
    """The gradient of a layer doubles in each step, starting at 1/1000 of another layer."""
    opt, named = guarded(
        {"head": torch.full((4,), 1e3), "deep": torch.full((4,), 1e-3)}, watch_every=2
    )
    for k in range(6):
        named["deep"].grad = torch.full((4,), 1e-3 * 2**k)
        opt.step()
    records = opt.records()
    watched = [r.watch["tensor_norms"]["deep"] for r in records if r.watch]
    assert [bool(r.watch) for r in records] == [True, False] * 3
    assert watched == pytest.approx([2e-3, 8e-3, 32e-3], rel=1e-6)
    assert records[-1].total_norm == pytest.approx(records[0].total_norm, rel=1e-8)


@pytest.mark.parametrize(
    ("dtype", "flat"), [*((d, False) for d in DTYPES), (torch.float32, True)], ids=str
)
def test_norms_are_computed_from_the_finite_elements(dtype: torch.dtype, flat: bool) -> None:
    torch.manual_seed(0)
    grads = {"a": torch.randn(7, 3).to(dtype), "b": torch.randn(1001).to(dtype)}
    expected = {name: torch.linalg.vector_norm(g.to(torch.complex128)) for name, g in grads.items()}
    opt, _ = guarded(grads, flat_buckets=flat)
    opt.step()
    found = opt.records()[0].watch["tensor_norms"]
    assert found == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-7)


def test_a_bad_element_is_ignored_and_does_not_affect_other_tensors() -> None:
    opt, _ = guarded({"bad": torch.tensor([3.0, math.nan, 4.0]), "good": torch.ones(4)})
    opt.step()
    [record] = opt.records()
    assert record.action == "skipped"
    assert record.watch["tensor_norms"] == {"bad": 5.0, "good": 2.0}


def test_the_share_of_zeros_is_recorded_for_tensors_with_zeros() -> None:
    grads = {
        "dead": torch.zeros(8),
        "half": torch.tensor([0.0, -0.0, 1.0, 2.0]),
        "live": -torch.ones(3),
    }
    opt, _ = guarded(grads)
    opt.step()
    assert opt.records()[0].watch["zero_share"] == {"dead": 1.0, "half": 0.5}


def test_the_norm_of_a_complex_gradient_includes_both_parts() -> None:
    opt, _ = guarded({"w": torch.tensor([3.0 + 0.0j, 0.0 + 4.0j])})
    opt.step()
    watched = opt.records()[0].watch
    assert watched == {"tensor_norms": {"w": 5.0}, "zero_share": {"w": 0.5}}


@pytest.mark.parametrize("flat", [False, True])
def test_norms_of_clip_scope_tensor_are_not_computed_twice(
    flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("the gradients are measured a second time")

    monkeypatch.setattr(quantity, "measure", refused)
    grads = {"a": torch.tensor([3.0, 4.0]), "unused": torch.ones(2), "b": torch.tensor([0.0, 2.0])}
    opt, named = guarded(grads, clip_scope="tensor", max_norm=1.0, flat_buckets=flat)
    named["unused"].grad = None
    opt.step()
    watched = opt.records()[0].watch
    assert watched == {"tensor_norms": {"a": 5.0, "b": 2.0}, "zero_share": {"b": 0.5}}


def test_clip_scope_tensor_with_another_norm_still_records_l2_norms() -> None:
    opt, _ = guarded({"a": torch.tensor([3.0, 4.0])}, clip_scope="tensor", norm_type=1.0)
    opt.step()
    assert opt.records()[0].watch["tensor_norms"] == {"a": 5.0}


def test_a_parameter_without_gradient_is_left_out() -> None:
    opt, named = guarded({"used": torch.ones(1), "unused": torch.ones(1)})
    named["unused"].grad = None
    opt.step()
    assert opt.records()[0].watch["tensor_norms"] == {"used": 1.0}


def test_norms_do_not_include_the_loss_scale() -> None:
    opt, _ = guarded({"w": torch.tensor([3.0, 4.0]) * 1024})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    scaler.step(opt)
    assert opt.records()[0].watch["tensor_norms"] == {"w": 5.0}


def test_watching_does_not_change_training_by_a_bit() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 3))
    twin = copy.deepcopy(model)
    everything = ("tensor_norms", "update_ratio", "underflow")
    for net, watch in ((model, everything), (twin, ())):
        opt = GuardedOptimizer(
            torch.optim.AdamW(net.parameters(), fused=True),
            max_norm=0.1,
            watch=watch,
            watch_every=1,
        )
        generator = torch.Generator().manual_seed(2)
        for _ in range(4):
            opt.zero_grad()
            net(torch.randn(5, 33, generator=generator)).square().sum().backward()
            opt.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_lines_on_disk_contain_the_watched_values(tmp_path: Any) -> None:
    opt, _ = guarded({"w": torch.tensor([3.0, 4.0])}, watch=("tensor_norms", "underflow"))
    with JsonLinesSink(tmp_path / "records.jsonl") as sink:
        opt.add_sink(sink)
        opt.step()
    [record] = read_records(tmp_path / "records.jsonl")
    assert record.watch == opt.records()[0].watch
    assert record.watch["tensor_norms"] == {"w": 5.0}


def test_a_copy_also_watches() -> None:
    opt, _ = guarded({"w": torch.ones(1)})
    twin = copy.deepcopy(opt)
    assert twin.watch == ("tensor_norms",)


def test_a_record_with_thousands_of_tensors_fits_into_a_line(tmp_path: Any) -> None:
    names = [f"blocks.{i}.attention.projection.weight" for i in range(9000)]
    grads = {name: torch.tensor([i + 1.0, 0.0]) for i, name in enumerate(names)}
    opt, _ = guarded(grads, watch=("tensor_norms", "update_ratio", "underflow"))
    with JsonLinesSink(tmp_path / "records.jsonl") as sink:
        opt.add_sink(sink)
        opt.step()
    assert (tmp_path / "records.jsonl").stat().st_size < 512 << 10
    [record] = read_records(tmp_path / "records.jsonl")
    norms = record.watch["tensor_norms"]
    assert 1000 < len(norms) < 9000
    assert min(norms.values()) == 9000 - len(norms) + 1  # the largest values are kept
