"""`diagnose` as a whole: what it takes, how far it goes, what it does not mistake for a fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import fastguard
from fastguard import Diagnosis, Finding, GuardedOptimizer, diagnose
from fastguard.diagnosis import CHECKS, KINDS
from fastguard.diagnosis.finding import SEVERITIES
from guardtest import require


def sound_batch(n: int = 8) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(n, 4)
    return inputs, inputs[:, :1] * 2


def sound_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))


def by_kind(found: Diagnosis) -> dict[str, Finding]:
    return {finding.kind: finding for finding in reversed(found.findings)}


# What it takes.


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) + self.right(right)


class ComputesItsLoss(nn.Module):
    """As the models of transformers do."""

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
def test_every_kind_of_batch_and_model_is_taken(make) -> None:
    model, batch, loss_fn, more = make(*sound_batch())
    found = diagnose(model, batch, loss_fn, **more)
    assert found.ok, str(found)
    assert "loss" in next(f.seen for f in found if f.check == "real steps")


class Mapped(nn.Module):
    """Computes its output sample by sample."""

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
def test_unusual_models_are_diagnosed_too(make) -> None:
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


def test_a_frozen_model_with_inputs_that_want_gradients() -> None:
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
    ],
)
def test_bad_arguments_are_named(change, says) -> None:
    arguments = {"model": sound_model(), "batch": sound_batch(), "loss_fn": nn.MSELoss()} | change
    with pytest.raises(TypeError) as error:
        diagnose(**arguments)
    assert says in str(error.value)


def test_a_guarded_optimizer_steps_as_it_would_with_its_clipping() -> None:
    """Unclipped, this learning rate destroys the model."""

    def found(max_norm: float | None) -> Diagnosis:
        torch.manual_seed(0)
        model = sound_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        guarded = GuardedOptimizer(optimizer, max_norm=max_norm)
        loss = nn.MSELoss(reduction="sum")
        return diagnose(model, sound_batch(64), loss, guarded)

    assert found(None).of("does-not-fall", "diverges")
    assert found(0.01).of("does-not-fall", "diverges") == []


# How far it goes.


def test_a_model_that_raises_is_still_told_all_else() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=0.0), nn.Linear(9, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inputs, targets = sound_batch()
    inputs[0, 0] = math.inf
    found = by_kind(diagnose(model, (inputs, targets), nn.MSELoss(), optimizer))
    assert found["forward-raises"].where == "2 (Linear)"
    assert "0 (Linear)" in found["nonfinite-activation"].seen
    assert {"lr-vanished", "norm-eps", "nonfinite-data"} <= found.keys()


def test_without_a_loss_the_way_back_begins_at_the_output() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    def broken_loss(output: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError("no loss today")

    found = by_kind(diagnose(Half(), sound_batch(), broken_loss))
    assert "no loss today" in found["loss-raises"].seen
    assert found["no-gradient"].where == "unused.weight"
    assert "contribute to the output" in found["no-gradient"].seen


def test_a_loss_that_checks_shapes_itself_is_understood() -> None:
    def strict_loss(output: Tensor, target: Tensor) -> Tensor:
        assert output.shape == target.shape, "shapes"
        return (output - target).square().mean()

    batch = torch.randn(2, 3, 4, 4), torch.rand(2, 1, 8, 8)
    found = by_kind(diagnose(nn.Conv2d(3, 1, 1), batch, strict_loss))
    assert "[2, 1, 4, 4], its target [2, 1, 8, 8]" in found["shape-mismatch"].seen
    assert found["shape-mismatch"].value == 4
    assert "loss-raises" not in found  # told once


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 5, 3)])
def test_class_numbers_fit_scores_by_class(shape) -> None:
    """So an error of the loss is not put down to shapes."""

    def broken_loss(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError("weights")

    width = math.prod(shape[1:])
    model = nn.Sequential(nn.Linear(4, width), nn.Unflatten(1, shape[1:]))
    labels = torch.zeros([n for n in shape if n != 3], dtype=torch.long)
    found = by_kind(diagnose(model, (torch.randn(8, 4), labels), broken_loss))
    assert "loss-raises" in found and "shape-mismatch" not in found


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch) -> None:
    """The batch of the second pass is another than that of the first."""
    calls = []

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("only once")
            return self.layer(x)

    model = Moody()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = diagnose(model, sound_batch(), functional.mse_loss, optimizer)
    stopped = [f for f in found.of("not-checked") if "only once" in f.seen]
    assert {f.check for f in stopped} == {"optimizer", "real steps"}
    assert all(f.severity == "warning" for f in stopped)
    assert {"initialisation", "data", "backward"} <= {f.check for f in found if f.severity == "ok"}


def test_activation_checkpoints_of_both_kinds() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.model, self.reentrant = sound_model(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)

    for reentrant in (False, True):
        model = Checkpointed(reentrant)
        gradient = model.model[0].weight.grad = torch.ones(16, 4)
        found = diagnose(model, sound_batch(), functional.mse_loss)
        assert found.ok, str(found)
        assert model.model[0].weight.grad is gradient and model.model[0].bias.grad is None
        assert gradient.eq(1).all()


def test_a_bad_batch_does_not_hide_what_is_wrong_with_the_model() -> None:
    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.norm(dim=1, keepdim=True)

    model = nn.Sequential(nn.Linear(4, 4, bias=False), Unit(), nn.Linear(4, 1))
    inputs, targets = sound_batch()
    inputs[0] = 0.0
    inputs[1, 2] = math.nan
    born = diagnose(model, (inputs, targets), nn.MSELoss()).of("nonfinite-activation")
    assert [f.where for f in born] == ["1 (Unit)", "0 (Linear)"]
    assert "the batch value batch[0] was non-finite before" in born[1].seen


def test_a_token_that_is_not_in_the_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 1))
    batch = torch.tensor([[1, 2], [3, 11]]), torch.randn(2, 1)
    found = by_kind(diagnose(model, batch, nn.MSELoss()))
    assert "from 1 to 11, allowed are 0 to 9" in found["index-out-of-range"].seen
    assert found["index-out-of-range"].where == "inputs"


def test_labels_of_further_batches_are_held_against_the_loss() -> None:
    model = nn.Linear(4, 3)
    good = torch.randn(8, 4), torch.arange(8) % 3
    bad = torch.randn(8, 4), torch.arange(8) % 3 + 1
    found = by_kind(diagnose(model, good, nn.CrossEntropyLoss(), data=[good, bad]))
    assert found["index-out-of-range"].where == "data[1].targets"


# What it does not mistake for a fault.


def squeezing(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output.squeeze(1), target)


def all_pairs(output: Tensor, target: Tensor) -> Tensor:
    return (output[:, None] - target).square().sum(-1).sqrt().min(dim=1).values.mean()


def nearest(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().min(dim=1).values.mean()


def masked(output: Tensor, target: Tensor) -> Tensor:
    return ((output * (target > -9)) - target).square().mean()


@pytest.mark.parametrize(
    "width, target, loss_fn",
    [
        (1, lambda: torch.randn(8), squeezing),
        (2, lambda: torch.randn(5, 2), all_pairs),
        (1, lambda: torch.randn(1, 5), nearest),
        (3, lambda: torch.randn(8, 1).expand(8, 3), masked),
        (3, lambda: torch.randn(8, 1), masked),
        (3, lambda: torch.tensor([0, 1, 2, -100] * 2), nn.CrossEntropyLoss()),
        (3, lambda: torch.rand(8, 3).softmax(1), nn.CrossEntropyLoss()),
    ],
    ids=["squeezed", "all-pairs", "nearest", "expanded", "mask", "ignored", "soft-labels"],
)
def test_losses_that_mean_what_they_do(width, target, loss_fn) -> None:
    found = diagnose(nn.Linear(4, width), (torch.randn(8, 4), target()), loss_fn)
    assert found.errors == [], str(found)


def test_an_attention_mask_of_minus_infinity_among_the_inputs() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            scores = self.mix(x) @ x.mT + mask
            return scores.softmax(-1) @ x

    mask = torch.full((6, 6), -math.inf).triu(1)
    batch = (torch.randn(3, 6, 4), mask), torch.randn(3, 6, 4)
    found = diagnose(Attends(), batch, nn.MSELoss())
    assert found.errors == [], str(found)


def test_a_schedule_that_warms_up_from_zero_has_not_vanished() -> None:
    model = sound_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))

    def severity() -> str:
        found = diagnose(model, sound_batch(), nn.MSELoss(), optimizer)
        return by_kind(found)["lr-vanished"].severity

    assert severity() == "warning"
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    assert severity() == "error"  # it has begun, and is still 0


def test_a_small_unused_head_is_no_error_and_a_large_one_is() -> None:
    class Pooled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body, self.pooler = nn.Linear(4, 1000), nn.Linear(1, width)
            self.head = nn.Linear(1000, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    def severity(width: int) -> str:
        found = diagnose(Pooled(width), sound_batch(), nn.MSELoss())
        return by_kind(found)["no-gradient"].severity

    assert [severity(1), severity(1000)] == ["warning", "error"]


def test_an_adapter_that_starts_from_zero_is_no_error() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(x) + self.up(self.down(x))

    inputs, _ = sound_batch()
    found = diagnose(Adapted(), (inputs, inputs.clone()), nn.MSELoss())
    assert found.errors == [], str(found)


# What it says.


def finding(kind: str, severity: str, check: str = "data", **more: Any) -> Finding:
    return Finding(check, kind, severity, "seen", **more)  # type: ignore[arg-type]


def test_errors_come_first_then_what_matters_most() -> None:
    model = sound_model()
    batch = sound_batch()
    optimizer = torch.optim.AdamW([model[2].weight], lr=8.88e-21)
    found = diagnose(model.eval(), batch, nn.MSELoss(reduction="sum"), optimizer, data=[batch])
    assert [(f.severity, f.kind) for f in found] == [
        ("error", "lr-vanished"),
        ("warning", "does-not-fall"),
        ("warning", "not-optimized"),
        ("warning", "sum-reduction"),
        ("note", "eval-mode"),
        *[("ok", "ok")] * 5,
    ]
    assert [f.check for f in found][5:] == [
        "initialisation",
        "data",
        "forward",
        "backward",
        "precision",
    ]


def test_the_order_of_kinds_is_that_of_the_story() -> None:
    story = ["shape-mismatch", "lr-vanished", "nonfinite-activation", "no-gradient"]
    places = [KINDS.index(kind) for kind in (*story, "nonfinite-data", "range")]
    assert places == sorted(places)
    assert len(set(KINDS)) == len(KINDS)


def test_a_diagnosis_in_words_and_numbers() -> None:
    found = Diagnosis(
        (
            finding("nonfinite-data", "error", where="inputs", value=math.inf, remedy="drop it"),
            finding("range", "warning", limit=100.0, value=255.0),
            finding("ok", "ok"),
        ),
        seconds=1.25,
    )
    assert str(found).splitlines() == [
        "ERROR   data: nonfinite-data in inputs",
        "        seen",
        "        Remedy: drop it",
        "WARNING data: range",
        "        seen",
        "OK      data: seen",
        "1 error, 1 warning in 1.2 s",
    ]
    assert found.worst == "error" and not found.ok and len(found.errors) == 1
    assert len(found.at_least("warning")) == 2 and found.of("range")[0].value == 255.0
    said = json.loads(found.to_json())
    assert said["findings"][0]["value"] == "Infinity" and said["worst"] == "error"
    assert list(found) == list(found.findings)
    assert Diagnosis((finding("ok", "ok"),), 0.1).ok


def test_the_table_shows_every_finding_and_takes_brackets_literally() -> None:
    require("rich")
    from rich.console import Console

    from fastguard.diagnosis.table import table

    found = Diagnosis(
        (
            finding("range", "warning", where="inputs[0]", value=255.0, limit=100.0, remedy="[/]"),
            finding("ok", "ok"),
        ),
        1.0,
    )
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(table(found))
    text = console.export_text()
    for part in ("range inputs[0]", "255", "limit 100", "→ [/]", "warning", "ok"):
        assert part in text


def test_the_public_names() -> None:
    names: list[tuple[str, Callable[..., Any]]] = [("diagnose", diagnose), ("Finding", Finding)]
    assert all(getattr(fastguard, name) is thing for name, thing in names)
    assert len(CHECKS) == 8 and SEVERITIES[0] == "error"
