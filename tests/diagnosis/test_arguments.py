"""Batches, models and data that `diagnose` accepts or refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fastguard import diagnose
from guardtest.sound import sound_batch, sound_model


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) + self.right(right)


class ComputesItsLoss(nn.Module):
    """Like the models of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.layer(x)
        return SimpleNamespace(logits=logits, loss=functional.mse_loss(logits, labels))


def steps(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    output = model(batch["x"])
    return {"fit": functional.mse_loss(output, batch["y"]), "size": output.square().mean()}


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (sound_model(), (x, y), functional.mse_loss, {}),
        lambda x, y: (sound_model(), {"inputs": x, "targets": y}, nn.MSELoss(), {}),
        lambda x, y: (TwoInputs(), ((x, x + 1), y), functional.mse_loss, {}),
        lambda x, y: (TwoInputs(), ({"left": x, "right": x}, y), functional.mse_loss, {}),
        lambda x, y: (ComputesItsLoss(), {"x": x, "labels": y}, None, {}),
        lambda x, y: (sound_model(), {"x": x, "y": y}, None, {"step": steps}),
        lambda x, y: (nn.DataParallel(sound_model()), (x, y), functional.mse_loss, {}),
        lambda x, y: (
            torch.compile(sound_model(), backend="eager"),
            (x, y),
            functional.mse_loss,
            {},
        ),
        lambda x, y: (
            sound_model(),
            (x, y),
            functional.mse_loss,
            {"data": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)},
        ),
    ],
    ids=[
        "pair",
        "mapping",
        "two-inputs",
        "keywords",
        "own-loss",
        "step",
        "data-parallel",
        "compiled",
        "loader",
    ],
)
def test_every_kind_of_batch_and_model_is_supported(make) -> None:
    model, batch, loss_fn, more = make(*sound_batch())
    found = diagnose(model, batch, loss_fn, **more)
    assert found.ok, str(found)
    assert "loss" in next(f.seen for f in found if f.check == "real steps")


class Mapped(nn.Module):
    """Computes its output sample by sample, under `torch.vmap`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda sample: torch.tanh(self.layer(sample)) * 3)(x)


class Complex(nn.Module):
    """A filter in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.fft.rfft(x).unsqueeze(1) @ self.filter).squeeze(1).real


@pytest.mark.parametrize(
    "make",
    [
        lambda: (Mapped(), torch.optim.AdamW),
        lambda: (Complex(), torch.optim.AdamW),
        lambda: (sound_model().double(), torch.optim.SGD),
    ],
    ids=["vmap", "complex", "float64"],
)
def test_unusual_models_are_supported(make) -> None:
    model, optimizer = make()
    batch = sound_batch()
    if next(model.parameters()).dtype is torch.float64:
        batch = batch[0].double(), batch[1].double()
    found = diagnose(model, batch, nn.MSELoss(), optimizer(model.parameters(), lr=1e-3))
    assert found.ok, str(found)


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(10, 1, sparse=True), nn.Flatten(0))
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=1e-3)
    found = diagnose(model, (torch.arange(10), torch.randn(10)), nn.MSELoss(), optimizer)
    assert found.ok, str(found)
    assert model[0].weight.grad is None


@pytest.mark.parametrize(
    "model", [nn.LazyLinear(1), nn.Linear(4, 1, device="meta")], ids=["lazy", "meta"]
)
def test_a_model_without_values_is_refused(model) -> None:
    with pytest.raises(ValueError, match="weight has no values yet"):
        diagnose(model, sound_batch(), nn.MSELoss())


def test_a_frozen_model_with_inputs_that_require_grad() -> None:
    inputs, targets = sound_batch()
    model = sound_model().requires_grad_(False)
    found = diagnose(model, (inputs.requires_grad_(), targets), nn.MSELoss())
    assert [f.kind for f in found.errors] == ["loss-detached"]


def test_an_iterator_of_batches_loses_eight() -> None:
    batches = iter([sound_batch() for _ in range(10)])
    diagnose(sound_model(), sound_batch(), functional.mse_loss, data=batches)
    assert len(list(batches)) == 2


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model": torch.zeros(1)}, "model is a Tensor, not a torch.nn.Module"),
        ({"batch": torch.zeros(1)}, "batch is a Tensor; pass (inputs, targets)"),
        ({"loss_fn": "mse"}, "loss_fn='mse' cannot be called"),
        ({"step": steps}, "both loss_fn and step are given"),
        ({"optimizer": [0.1]}, "optimizer is a list, not a torch.optim.Optimizer"),
        ({"data": 3}, "data is a int; pass an iterable of batches"),
        ({"batch": ()}, "batch is a tuple of 0; pass (inputs, targets)"),
        ({"batch": DataLoader([1])}, "batch is a DataLoader; pass one batch from it: next(iter("),
        ({"loss_fn": nn.MSELoss}, "loss_fn is the class MSELoss; pass an instance of it"),
        ({"autocast": 16}, "autocast=16 is not a context; pass 'float16', 'bfloat16' or"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",  # no memory addresses
)
def test_invalid_arguments_raise_errors_that_name_them(change, says) -> None:
    arguments = {"model": sound_model(), "batch": sound_batch(), "loss_fn": nn.MSELoss()} | change
    with pytest.raises(TypeError) as error:
        diagnose(**arguments)
    assert says in str(error.value)


def test_autocast_may_be_given_as_the_name_of_a_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1))
    nn.init.constant_(model[0].bias, 1e5)
    found = diagnose(model, sound_batch(), nn.MSELoss(), autocast="float16")
    assert found.of("float16-range")
    with pytest.raises(ValueError, match="autocast='float8': choose 'float16' or 'bfloat16'"):
        diagnose(model, sound_batch(), nn.MSELoss(), autocast="float8")


def test_a_step_may_take_a_batch_without_tensors() -> None:
    x, y = sound_batch()
    found = diagnose(
        sound_model(), "first", step=lambda model, name: functional.mse_loss(model(x), y)
    )
    assert [f.kind for f in found if f.check == "data"] == ["ok"], str(found)
