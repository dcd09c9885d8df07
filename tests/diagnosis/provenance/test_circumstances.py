"""Causes found in the arguments of a call: too few values, too long targets, fully masked rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastguard import explain_nonfinite
from guardtest.chains import Call, chain, mean

pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0.*")

ONE_VALUE = {
    "std": lambda x: (x - x.mean(0)) / (x.std(0) + 1e-8),
    "unbiased": lambda x: x.std(dim=0, unbiased=True),
    "var": lambda x: (x - x.mean(0)) * (x.var(0) + 1e-5).rsqrt(),
    "std_mean": lambda x: torch.sub(*torch.std_mean(x, dim=0)),
    "var_mean": lambda x: torch.var_mean(x, dim=0)[0],
    "one-element": lambda x: x / x[0, 0].std(),
    "list-of-dims": lambda x: x - x.view(1, 2, 2).std((0,), keepdim=True).flatten(1),
    "bfloat16": lambda x: x.bfloat16().std(0).float(),
    "hidden": lambda x: torch.where(torch.zeros(4, dtype=torch.bool), x.std(0), x[0]),
}


@pytest.mark.parametrize("function", ONE_VALUE.values(), ids=ONE_VALUE)
def test_standard_deviation_of_one_value_is_explained(function) -> None:
    report = explain_nonfinite(chain(Call(function)), (torch.randn(1, 4), None), mean)
    assert report.kind == "variance of too few values"
    assert "of 1 value with correction=1 (Bessel's) divides 0 by 1 - 1" in report.evidence
    assert "correction=0" in report.remedy and "skip" in report.remedy
    assert report.source is not None and "test_circumstances.py" in report.source


def test_a_correction_equal_to_the_number_of_values_is_explained() -> None:
    call = Call(lambda x: x.var(1, correction=4))
    report = explain_nonfinite(chain(call), (torch.randn(4, 4), None), mean)
    assert "variance of 4 values with correction=4" in report.evidence


def test_a_standard_deviation_that_overflows_is_not_explained_by_its_correction() -> None:
    call = Call(lambda x: (x.double() * 1e300).std(0).float())  # the squares overflow
    report = explain_nonfinite(chain(call), (torch.randn(3, 4), None), mean)
    assert report.operation == "aten.std.correction"
    assert report.kind != "variance of too few values"


COVARIANCES = {
    "one-sample": lambda x: torch.cov(x.T),
    "correlation": lambda x: torch.corrcoef(x.T),
    "correction": lambda x: torch.cov(x.repeat(3, 1).T, correction=3),
    "counts": lambda x: torch.cov(x.repeat(2, 1).T, fweights=torch.tensor([1, 0])),
    "weights": lambda x: torch.cov(x.T, aweights=torch.tensor([0.5])),
    "complex": lambda x: torch.cov(torch.complex(x, x).T).abs(),
}


@pytest.mark.parametrize("function", COVARIANCES.values(), ids=COVARIANCES)
def test_a_covariance_of_too_few_samples_is_explained(function) -> None:
    report = explain_nonfinite(chain(Call(function)), (torch.randn(1, 4), None), mean)
    assert report.kind == "covariance of too few samples"
    assert "correction, which is 1" in report.evidence and "correction=0" in report.remedy


def test_another_matrix_divided_by_zero_is_no_covariance() -> None:
    call = Call(lambda x: x.repeat(4, 1) / torch.zeros(()))
    assert explain_nonfinite(chain(call), (torch.randn(1, 4), None), mean).kind == "division"


@pytest.mark.parametrize(
    "divide, says",
    [
        (lambda x: x.sum(0) / (len(x) - 1), "the denominator is the Python number 0"),
        (lambda x: x.sum(0) / (x > 1e9).sum(), "the denominator, an integer, is 0"),
        (lambda x: x / (x > 1e9).sum(0), "4 of 4 denominators are exactly 0; they are integers"),
    ],
    ids=["number", "count", "counts"],
)
def test_division_by_a_zero_count_is_explained(divide, says: str) -> None:
    report = explain_nonfinite(chain(Call(divide)), (torch.randn(1, 4), None), mean)
    assert report.kind == "division" and says in report.evidence
    assert "max(count, 1)" in report.remedy


def ctc(inputs, lengths, targets, *, tensors=True, loss=functional.ctc_loss, **settings):
    torch.manual_seed(0)
    as_given = torch.tensor if tensors else tuple

    def step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        scores = model(batch).log_softmax(-1)
        found = loss(scores, torch.tensor(targets), as_given(inputs), as_given(lengths), **settings)
        return found.mean()

    return explain_nonfinite(nn.Linear(4, 6), torch.randn(5, len(inputs), 4), step=step)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (([5, 5], [3, 7], [[1, 2, 3, 0, 0, 0, 0], [1, 2, 3, 4, 5, 1, 2]]), "sample 1 has 7 labels"),
        (([5, 5], [3, 7], [1, 2, 3, 1, 2, 3, 4, 5, 1, 2]), "sample 1 has 7 labels"),
        (([5, 5], [4, 3], [[1, 1, 1, 1], [1, 2, 3, 0]]), "sample 0 has 4 labels and 3 blanks"),
        (([5, 0], [3, 2], [1, 2, 3, 4, 5]), "sample 1 has 2 labels for 0 time steps"),
    ],
    ids=["padded", "concatenated", "repeats", "no-input"],
)
@pytest.mark.parametrize("tensors", [True, False], ids=["tensors", "tuples"])
def test_ctc_targets_longer_than_their_input_are_explained(
    arguments, says: str, tensors: bool
) -> None:
    for settings in ({}, {"reduction": "none"}, {"loss": nn.CTCLoss(reduction="sum")}):
        report = ctc(*arguments, tensors=tensors, **settings)
        assert report.kind == "CTC target longer than its input"
        assert report.evidence.startswith("1 of 2 samples cannot be aligned")
        assert says in report.evidence and "zero_infinity=True" in report.remedy
    assert not ctc(*arguments, tensors=tensors, zero_infinity=True).found


def test_an_infinite_ctc_loss_with_another_cause_is_not_explained_by_lengths() -> None:
    def step(model, batch):
        scores = model(batch).log_softmax(-1).masked_fill(torch.arange(6) == 2, -math.inf)
        return functional.ctc_loss(scores, torch.tensor([[1, 2]]), (5,), (2,))

    report = explain_nonfinite(nn.Linear(4, 6), torch.randn(5, 1, 4), step=step)
    assert report.found and report.kind != "CTC target longer than its input"


def test_a_softmax_of_a_fully_masked_row_is_explained() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1] = True
    call = Call(lambda x: x.masked_fill(mask, -math.inf).softmax(-1))
    report = explain_nonfinite(chain(call), (torch.randn(3, 4), None), mean)
    assert "1 of 3 rows are entirely -Inf" in report.evidence
    assert "unmasked" in report.remedy


def test_an_inf_written_by_the_program_that_reaches_the_loss_is_explained() -> None:
    everything = torch.ones(3, 4, dtype=torch.bool)
    call = Call(lambda x: x + x.masked_fill(everything, -math.inf).logsumexp(-1, keepdim=True))
    model = nn.Sequential(nn.Linear(4, 4), call)
    report = explain_nonfinite(model, (torch.randn(3, 4), None), mean)
    assert report.kind == "an Inf that the program wrote"
    assert "nothing removed it afterward" in report.evidence and "finfo" in report.remedy


def test_roots_quotients_and_norms_are_explained_by_ranges() -> None:
    def explained(function, inputs=None):
        inputs = torch.zeros(3, 4) if inputs is None else inputs
        return explain_nonfinite(chain(Call(function)), (inputs, None), mean)

    quotient = explained(lambda x: torch.where(x == 0, 0.0, 1 / x))
    assert quotient.evidence == "12 of 12 denominators are exactly 0"
    root = explained(lambda x: x * x.square().mean(-1, keepdim=True).rsqrt())
    assert root.remedy.startswith("1 / sqrt(0) is Inf")
    behind_where = explained(lambda x: torch.where(x > 0, x.sqrt(), x))
    assert behind_where.operation == "SqrtBackward0"
    assert "gradient" not in behind_where.evidence
    negative = explained(
        lambda x: functional.batch_norm(x, torch.zeros(4), -torch.ones(4)), torch.randn(3, 4)
    )
    assert negative.evidence == "the running variance goes down to -1"


@pytest.mark.parametrize("shape", [(6,), (2, 3, 3)], ids=["classes", "images"])
def test_a_mean_over_ignored_or_weightless_targets_is_explained(shape: tuple[int, ...]) -> None:
    def explained(targets, **settings):
        model = nn.Conv2d(4, 5, 1) if len(shape) > 1 else nn.Linear(4, 5)
        inputs = torch.randn(shape[0], 4, *shape[1:])
        return explain_nonfinite(model, (inputs, targets), nn.CrossEntropyLoss(**settings))

    ignored = explained(torch.full(shape, -1), ignore_index=-1)
    n = math.prod(shape)
    assert ignored.evidence.startswith(f"all {n} targets are ignore_index=-1")
    assert "prompt mask" in ignored.remedy
    weightless = explained(torch.full(shape, 2), weight=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    expected = f"the class weights of all {n} targets that are not ignored are 0"
    assert weightless.evidence.startswith(expected)
