"""Parameters without dense real gradients are refused before any change."""

import pytest
import torch
from torch import nn

from fastguard import FlatGradBuckets
from guardtest.training import new_parameters


def test_parameters_without_dense_real_gradients_are_refused_and_nothing_is_attached():
    good = nn.Parameter(torch.zeros(2))
    for bad, message in (
        (nn.Parameter(torch.zeros(2, dtype=torch.complex64)), "parameter 1 is torch.complex64"),
        (good, "parameter 1 appears twice"),
        ("weight", "parameter 1 is a str"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            FlatGradBuckets([good, bad])
        assert good.grad is None
    for nothing in ([], [torch.zeros(2)]):
        with pytest.raises(ValueError, match="no parameter that requires grad"):
            FlatGradBuckets(nothing)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        FlatGradBuckets(p for p in ())


@pytest.mark.parametrize("model", [nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 1)), None, 3])
def test_a_model_instead_of_parameters_is_refused(model):
    with pytest.raises(TypeError, match=r"parameters is a \w+; pass model.named_parameters\(\)"):
        FlatGradBuckets(model)


def test_an_existing_sparse_gradient_is_refused_and_nothing_is_attached():
    (dense,) = new_parameters([(3,)])
    dense.grad = grad = torch.ones(3)
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="use sparse=False"):
        FlatGradBuckets([dense, embedding.weight])
    assert dense.grad is grad


def test_a_sparse_gradient_is_refused_before_anything_changes():
    embedding = nn.Embedding(5, 2, sparse=True)
    flat = FlatGradBuckets(embedding.parameters())
    embedding.weight.grad = None
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="use sparse=False"):
        flat.measure()
    assert embedding.weight.grad.is_sparse
    flat.zero_()
    embedding(torch.tensor([1, 1])).sum().backward()  # accumulates into the dense slot
    assert flat.measure().total_norm.item() == pytest.approx(8**0.5)
