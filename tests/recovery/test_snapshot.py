"""`Snapshot` restores a state exactly, and names non-finite tensors."""

from __future__ import annotations

import collections
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBuckets
from fastguard.recovery.snapshot import CHECKED_SHARE, Snapshot
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure

NAN, INF = math.nan, math.inf


class Holder:
    """An object with a single value as its state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def taken(value: Any) -> Snapshot:
    slot = Snapshot()
    slot.take({"x": Holder(value)}, 1, None)
    return slot


def restored(slot: Snapshot) -> Any:
    holder = Holder(None)
    slot.restore({"x": holder})
    return holder.value


SPARSE = torch.sparse_coo_tensor([[0, 2]], torch.tensor([1.0, NAN]), (4,), check_invariants=True)


@pytest.mark.parametrize(
    ("value", "bad"),
    [
        (torch.tensor([1.0, NAN]), ["x.value"]),
        (torch.tensor([1.0, -INF], dtype=torch.float64), ["x.value"]),
        (torch.tensor([INF]).bfloat16(), ["x.value"]),
        (torch.tensor([1.0, complex(0.0, NAN)]), ["x.value"]),
        (torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn), ["x.value"]),
        (SPARSE, ["x.value"]),
        ([torch.ones(2), (torch.tensor(NAN),)], ["x.value.1.0"]),
        ({"deep": {"er": torch.tensor([NAN])}}, ["x.value.deep.er"]),
        ([torch.empty(0), torch.tensor([3]), torch.tensor(True), torch.ones(3).half()], []),
        ("nan", []),
        ({"lr": [0.1, NAN], "best": INF, "worst": -INF}, ["x.value.lr.1"]),
        (NAN, ["x.value"]),
        ([NAN, torch.tensor(NAN)], ["x.value.1", "x.value.0"]),
    ],
    ids=[
        *("f32", "f64", "bf16", "complex", "fp8", "coo", "list", "dict", "fine", "text"),
        *("numbers", "number", "both"),
    ],
)
def test_nonfinite_tensors_are_named(value: Any, bad: list[str]) -> None:
    assert taken(value).nonfinite() == bad


def test_a_restored_state_has_its_original_type() -> None:
    value = {
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "ordered": collections.OrderedDict(b=torch.ones(1), a=2),
        "size": torch.Size([2, 3]),
        "tuple": (1, [torch.zeros(2)]),
        "set": {3},
    }
    found = restored(taken(value))
    assert repr(found) == repr(value)
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in value.items()}
    assert repr(restored(taken(SPARSE))) == repr(SPARSE)


def test_trained_state_and_parameters_stay_what_they_are() -> None:
    value = {
        "trained": torch.ones(2, requires_grad=True),
        "weight": torch.nn.Parameter(torch.ones(3)),
        "frozen": torch.nn.Parameter(torch.ones(3), requires_grad=False),
    }
    slot = Snapshot()
    for _ in range(2):  # the second copy reuses the buffers of the first
        slot.take({"x": Holder(value)}, 1, None)
    assert slot.nonfinite() == []
    with torch.no_grad():
        value["trained"].mul_(3)
    for name, after in restored(slot).items():
        before = value[name]
        assert type(after) is type(before) and after is not before, name
        assert after.requires_grad == before.requires_grad and after.is_leaf, name
        assert torch.equal(after, torch.ones_like(after)), name


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_compressed_sparse_tensor_is_checked_too() -> None:
    assert taken(torch.tensor([[0.0, NAN]]).to_sparse_csr()).nonfinite() == ["x.value"]


def test_a_milestone_schedule_keeps_its_closed_form() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.1)
    slot = Snapshot()
    slot.take({"lr": schedule}, 1, None)
    slot.restore({"lr": schedule})
    with pytest.warns(UserWarning):
        schedule.step(3)  # uses the elements of the Counter of milestones
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_module_versions_survive() -> None:
    norm = torch.nn.BatchNorm1d(2)
    slot = Snapshot()
    slot.take({"norm": norm}, 1, None)
    seen: list[Any] = []

    class Looking(torch.nn.BatchNorm1d):
        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            seen.append(metadata.pop("version"))  # the object may change its copy
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    for _ in range(2):
        slot.restore({"norm": Looking(2)})
    assert seen == [norm._version] * 2


def test_later_changes_of_values_do_not_reach_a_snapshot() -> None:
    value = [torch.ones(2), {"seen": {1}}, collections.Counter("a")]
    before = copy.deepcopy(value)
    slot = taken(value)
    for _ in range(2):  # changes of restored values do not reach the snapshot either
        value[0] += 1
        value[1]["seen"].add(2)
        value[2]["b"] += 1
        value = restored(slot)
        assert repr(value) == repr(before)


def test_a_tensor_whose_shape_or_dtype_changed_is_copied_anew() -> None:
    slot = Snapshot()
    values = [torch.ones(3), torch.ones(2, 3) / 3, torch.ones(2, 3).double() / 3, [torch.ones(1)]]
    for step, value in enumerate(values):
        slot.take({"x": Holder(value)}, step, None)
        assert repr(restored(slot)) == repr(value)
    for n in (2.0, 3.0):  # changes the elements, but not the shape
        slot.take({"x": Holder(torch.diag(torch.arange(3) < n).float().to_sparse())}, 5, None)
        assert restored(slot).to_dense().sum() == n


def test_buffers_inside_lists_are_reused_too() -> None:
    slot = taken([torch.ones(64)])
    first = slot._states["x"]["value"][0].data_ptr()
    slot.take({"x": Holder([torch.zeros(64)])}, 2, None)
    assert slot._states["x"]["value"][0].data_ptr() == first


def test_a_copy_holds_no_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    for _ in range(2):
        found: Tensor = restored(taken(weight * 2))
        assert not found.requires_grad and found.tolist() == [2.0, 2.0]


class Fails:
    """Cannot be copied because of an unrelated error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __deepcopy__(self, memo: Any) -> Fails:
        raise self.error


@pytest.mark.parametrize("error", [MemoryError(), TimeoutError("limit"), torch.OutOfMemoryError()])
def test_unrelated_errors_of_a_copy_are_raised_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        taken([1.0, Fails(error)])
    assert raised.value is error


def test_out_of_memory_is_not_reported_as_a_tensor_that_cannot_be_copied() -> None:
    with pytest.raises(RuntimeError, match="allocate memory"):
        taken(torch.ones(1).expand(1 << 50))


def test_the_random_states_are_those_of_the_latest_copy() -> None:
    slot = taken(None)
    torch.rand(3)
    slot.take({}, 2, None)
    drawn = torch.rand(3)
    slot.restore({})
    assert torch.equal(torch.rand(3), drawn)


def test_an_unfinished_copy_is_not_a_snapshot() -> None:
    class Failing(Holder):
        def state_dict(self) -> dict[str, Any]:
            raise KeyError("a state that cannot be had")

    slot = taken(torch.ones(1))
    assert slot.step == 1
    with pytest.raises(ValueError, match=r"'x' .* Failing.*a state that cannot be had"):
        slot.take({"x": Failing(None)}, 2, None)
    assert slot.step is None


def test_tensors_known_to_be_finite_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastguard.recovery.snapshot.CHECKED_SHARE", 1.0)
    values = [torch.ones(5), torch.ones(2, 3).T, torch.ones(3).half(), torch.tensor(2), "text", 3.0]
    slot = taken(values)
    read = names_read(monkeypatch)
    assert slot.nonfinite() == [] and read() == set()
    slot.take({"x": Holder([torch.ones(2), torch.tensor(NAN)])}, 2, None)
    assert slot.nonfinite() == ["x.value.1"] and read() == {"x.value.1"}
    slot.take({"x": Holder(values)}, 3, None)
    assert slot.nonfinite() == [] and read() == set()


def test_unchecked_tensors_are_read_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.ones(100 + i % 7) for i in range(50)]
    slot = taken(values)
    read = names_read(monkeypatch)
    assert slot.nonfinite() == []
    left = sum(values[int(name.rpartition(".")[2])].numel() for name in read())
    assert left / sum(map(torch.numel, values)) == pytest.approx(1 - CHECKED_SHARE, abs=0.02)
    for i, value in enumerate(values):
        value[i] = NAN
        slot.take({"x": Holder(values)}, 2, None)
        assert slot.nonfinite() == [f"x.value.{i}"]
        value[i] = 1.0
    slot.take({"x": Holder(values)}, 3, None, check=False)
    assert slot.nonfinite() == [] and len(read()) == len(values)


def names_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Returns the names that `nonfinite` has read since the last call."""
    names: set[str] = set()

    def read(buckets: GradBuckets) -> GradStats:
        names.update(buckets.names or ())
        return measure(buckets)

    def since() -> set[str]:
        found = set(names)
        names.clear()
        return found

    monkeypatch.setattr("fastguard.recovery.snapshot.measure", read)
    return since


def test_large_values_whose_sum_overflows_are_finite() -> None:
    assert taken([torch.full((9,), 3e38), torch.full((9,), -6e4).half()]).nonfinite() == []


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 100])
def test_a_copy_in_pieces_is_complete(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastguard.gradients.host_copies.PIECE", 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    values = [torch.arange(size) / 3, torch.randn(size, 3).T, torch.arange(size)]
    slot = taken(values)
    assert all(map(torch.equal, restored(slot), values))
    assert slot.nonfinite() == []
    for at in range(0, size, 3):
        values[0][at] = NAN
        assert taken(values).nonfinite() == ["x.value.0"]
        values[0][at] = 1.0


def test_tensors_on_a_gpu_are_checked_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a GPU is ten times as fast, and the host has no work."""
    monkeypatch.setattr("fastguard.recovery.snapshot._on_gpu", lambda tensor: tensor.ndim == 2)
    values = {"gpu": torch.ones(2, 2), "host": torch.tensor([1.0, NAN]), "n": NAN}
    slot = taken(values)
    assert slot.nonfinite() == ["x.value.host", "x.value.n"]
    values["gpu"][1, 1] = INF
    slot.take({"x": Holder(values)}, 2, None)
    values["gpu"][1, 1] = 1.0  # was checked during the copy
    slot._states["x"]["value"]["gpu"].zero_()
    assert slot.nonfinite() == ["x.value.gpu", "x.value.host", "x.value.n"]
