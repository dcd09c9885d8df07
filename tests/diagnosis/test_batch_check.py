"""`check_batch` finds problems in one read, and the guarded step acts on its signals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import Threshold, check_batch
from fastguard.diagnosis import batch_check

NAN, INF = math.nan, math.inf


def problems(batch, **kwargs) -> list[str]:
    return [str(p) for p in check_batch(batch, **kwargs).problems()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "values, says",
    [
        ([0.0, 1.0], []),
        ([0.0, NAN], ["inputs holds NaN"]),
        ([NAN, NAN], ["inputs holds NaN"]),
        ([0.0, INF], ["inputs holds +Inf"]),
        ([-INF, INF, 0.0], ["inputs holds -Inf and +Inf"]),
        ([-INF, NAN, 0.0], ["inputs holds NaN"]),
        ([0.5, 0.5, 0.5], ["inputs is 0.5 everywhere"]),
        ([0.5], []),
        ([], []),
    ],
)
def test_problems_are_described(values, says, dtype):
    assert problems(torch.tensor(values, dtype=dtype)) == says


def test_nan_in_the_last_element_is_found():
    x = torch.rand(100_003)
    x[-1] = NAN
    assert problems(x) == ["inputs holds NaN"]


def test_tensors_in_nested_containers_are_named():
    bad = torch.tensor([NAN])
    batch = (
        {"image": bad, "meta": ["text", 3, None]},
        [bad, {"boxes": bad}],
        bad,
    )
    names = [p.name for p in check_batch(batch).problems()]
    assert names == ["inputs.image", "targets[0]", "targets[1].boxes", "[2]"]
    assert [p.name for p in check_batch({"x": bad, "y": (bad,)}).problems()] == ["x", "y[0]"]
    assert [p.name for p in check_batch([bad, bad], names=["a"]).problems()] == ["a", "[1]"]


def test_a_number_limits_floats_and_a_dict_limits_tensors_by_pattern():
    batch = torch.tensor([-3.0, 300.0]), torch.tensor([0, 12])
    assert problems(batch, low=0.0, high=255.0) == [
        "inputs goes down to -3, below 0",
        "inputs goes up to 300, above 255",
    ]
    assert problems(batch, high={"tar*": 9}) == ["targets goes up to 12, above 9"]
    assert problems(batch, low=-3.0, high=300.0) == []


def test_constant_labels_are_not_a_problem():
    assert problems((torch.rand(3), torch.zeros(4, dtype=torch.long))) == []
    assert problems((torch.rand(3), torch.ones(4, dtype=torch.bool))) == []


def test_complex_sparse_8_bit_and_strided_tensors_are_checked():
    assert problems(torch.tensor([1 + 1j, complex(0, NAN)])) == ["inputs holds NaN"]
    sparse = torch.sparse_coo_tensor([[0, 2]], [1.0, INF], (4,))
    assert problems(sparse) == ["inputs holds +Inf"]
    assert problems(torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn)) == ["inputs holds NaN"]
    x = torch.rand(4, 6)
    x[1, 1] = NAN
    assert problems(x.T[::2]) == []
    assert problems(x.T[1::2]) == ["inputs holds NaN"]


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_unsigned_integers_are_checked(bits):
    dtype = getattr(torch, f"uint{bits}")
    top = 2 ** min(bits, 53) - 1
    x = torch.tensor([3, top], dtype=torch.int64).to(dtype)
    check = check_batch(x, high={"inputs": 9})
    assert (check.low.item(), check.high.item()) == (3, top)
    assert [p.kind for p in check.problems()] == ["high"]


@pytest.mark.parametrize("batch", [None, "abc", {"text": "hello"}, [], (1.0, [2])])
def test_a_batch_without_tensors_raises_value_error(batch):
    with pytest.raises(ValueError, match=r"contains no tensor to check"):
        check_batch(batch)


def test_read_batch_allows_a_batch_without_tensors():
    assert batch_check.read_batch("abc", low={"inputs*": 0.0}, names=()).problems() == []


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"high": {"inptus": 1.0}}, ValueError, r"high\['inptus'\] matches no tensor.*'inputs'"),
        ({"low": {"inputs": 0.0, "y*": 1}}, ValueError, r"low\['y\*'\].*valid are inputs, targets"),
        ({"low": 1, "high": 0}, ValueError, r"low=1\.0 of inputs is above high=0\.0"),
        ({"low": {"inputs": 2}, "high": 1}, ValueError, r"low=2\.0 of inputs is above high=1\.0"),
        ({"low": "a"}, TypeError, r"low='a' is not a number"),
        ({"high": {"inputs": "1"}}, TypeError, r"high\['inputs'\]='1' is not a number"),
        ({"low": [0.0]}, TypeError, r"low=\[0\.0\] is not a number"),
        ({"high": {"inputs": None}}, TypeError, r"high\['inputs'\]=None is not a number"),
    ],
)
def test_invalid_limits_raise_errors_that_name_them(limits, error, message):
    with pytest.raises(error, match=message):
        check_batch((torch.rand(2), torch.rand(2)), **limits)


def test_brackets_in_a_pattern_are_indices():
    """Plain `fnmatch` would treat `[1]` as the character 1."""
    far = torch.tensor([0.0, 5.0])
    batch = ([far, far], far, far)
    for pattern, names in (
        ("inputs[1]", ["inputs[1]"]),
        ("inputs[0]*", ["inputs[0]"]),
        ("[2]", ["[2]"]),
        ("*[[]0]", ["inputs[0]"]),
        ("[it]*s", ["targets"]),
    ):
        problems = check_batch(batch, high={pattern: 1.0}).problems()
        assert [p.name for p in problems] == names


def test_the_first_matching_pattern_applies():
    check = check_batch(
        (torch.tensor([0.0, 5.0]), torch.tensor([0.0, 5.0])), high={"inputs": 9, "*": 1}
    )
    assert [p.name for p in check.problems()] == ["targets"]
    equal = check_batch(torch.tensor([1.0, 2.0]), low=1, high=1)
    assert [p.kind for p in equal.problems()] == ["high"]


@pytest.mark.parametrize(
    "values, signal",
    [
        ([0.0, 1.0], 0.0),
        ([0.0, 2.0], 1.0),
        ([-1.0, 0.5], 1.0),
        ([0.5, 0.5], 1.0),
        ([], 0.0),
        ([0.0, NAN], NAN),
        ([0.0, INF], NAN),
        ([0.0, -INF], NAN),
    ],
)
def test_signals_are_0_1_or_nan(values, signal):
    signals = check_batch(torch.tensor(values), low=0.0, high=1.0).signals()
    (value,) = signals.values()
    assert list(signals) == ["batch.inputs"]
    assert value.shape == ()
    torch.testing.assert_close(value.item(), signal, equal_nan=True)


def test_the_guarded_step_skips_and_records_a_bad_batch():
    """The model hides the NaN with `nan_to_num`, so only the check sees it."""
    model = nn.Linear(2, 1)
    opt = fastguard.GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        spike={"batch.inputs": Threshold(max=0.5, action="record")},
    )
    batches = [[[0.1, 0.2]], [[0.3, NAN]], [[0.3, 7.0]], [[0.3, 0.4]]]
    for tag, batch in enumerate(batches):
        x = torch.tensor(batch)
        loss = model(x.nan_to_num()).square().mean()
        loss.backward()
        before = model.weight.detach().clone()
        signals = check_batch(x, low=0.0, high=1.0).signals()
        opt.step(loss={"loss": loss, **signals}, tag=tag)
        assert torch.equal(before, model.weight) == (tag == 1)
        opt.zero_grad()
    clean, nan, far, _ = opt.records()
    assert (clean.action, clean.losses["batch.inputs"]) == ("applied", 0.0)
    assert (nan.action, nan.reason) == ("skipped", "nonfinite_loss")
    assert math.isnan(nan.losses["batch.inputs"]) and math.isfinite(nan.losses["loss"])
    assert (far.action, far.reason, far.spikes) == ("applied", "loss_spike", ("batch.inputs",))


@pytest.mark.parametrize("kwargs", [{"low": NAN}, {"high": {"inputs": NAN}}])
def test_a_nan_limit_raises_value_error(kwargs):
    with pytest.raises(ValueError, match="NaN"):
        check_batch(torch.rand(2), **kwargs)
