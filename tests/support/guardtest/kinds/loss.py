"""The loss: its value, its shape, its parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import classification, mlp, regression


@case("loss-raises", "error", "loss", says="no such weighting")
def loss_raises(sick: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if sick:
            raise KeyError("no such weighting")
        return functional.mse_loss(output, target)

    return regression(loss_fn=loss)


@case("loss-shape", "error", "loss", says="shape [8, 1]")
def loss_shape(sick: bool) -> Setup:
    return regression(loss_fn=nn.MSELoss(reduction="none" if sick else "mean"))


@case("loss-detached", "error", "loss")
def loss_detached(sick: bool) -> Setup:
    return regression(
        loss_fn=lambda output, target: functional.mse_loss(
            output.detach() if sick else output, target
        )
    )


@case("nonfinite-loss", "error", "loss", where="distance", says="aten.log.default")
def nonfinite_loss(sick: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        distance = ((output - output) + (0.0 if sick else 1.0)).log().mean()
        return {"fit": functional.mse_loss(output, target), "distance": distance}

    return regression(loss_fn=loss)


@case("large-loss", "warning", "loss")
def large_loss(sick: bool) -> Setup:
    factor = 1e6 if sick else 1.0
    return regression(loss_fn=lambda output, target: factor * functional.mse_loss(output, target))


@case("loss-parts", "warning", "loss", where="prior")
def loss_parts(sick: bool) -> Setup:
    factor = 1e-6 if sick else 1.0

    def loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        prior = factor * (output.square().mean() + 0.1)
        return {"fit": functional.mse_loss(output, target), "prior": prior}

    return regression(loss_fn=loss)


@case("sum-reduction", "warning", "loss")
def sum_reduction(sick: bool) -> Setup:
    return regression(loss_fn=nn.MSELoss(reduction="sum" if sick else "mean"))


@case("activated-twice", "error", "loss", where="cross_entropy", says="cannot fall below 0.551")
def activated_twice(sick: bool) -> Setup:
    end = nn.Softmax(1) if sick else nn.Identity()
    return classification(model=nn.Sequential(mlp(4, 16, 3), end))


@case("wrong-form", "error", "loss", where="input of nll_loss", says="not 1")
def wrong_form(sick: bool) -> Setup:
    end = nn.Identity() if sick else nn.LogSoftmax(1)
    return classification(model=nn.Sequential(mlp(4, 16, 3), end), loss_fn=nn.NLLLoss())


@case("wrong-axis", "error", "forward", where="1 (LogSoftmax)", says="holds the 8 samples")
def wrong_axis(sick: bool) -> Setup:
    end = nn.LogSoftmax(0 if sick else 1)
    return classification(model=nn.Sequential(mlp(4, 16, 3), end), loss_fn=nn.NLLLoss())


@case("swapped-arguments", "error", "loss", where="kl_div", says="got probabilities as input")
def swapped_arguments(sick: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        pair = (target, output) if sick else (output, target)
        return functional.kl_div(*pair, reduction="batchmean")

    batch = torch.randn(8, 4), torch.rand(8, 3).softmax(1)
    model = nn.Sequential(mlp(4, 16, 3), nn.LogSoftmax(1))
    return {"model": model, "batch": batch, "loss_fn": loss}


@case("unaligned-targets", "error", "loss", where="target of ctc_loss", says="4 labels for 3 time")
def unaligned_targets(sick: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        steps = (3 if sick else 6,) * 8
        return functional.ctc_loss(output, target, steps, (4,) * 8, zero_infinity=True)

    batch = torch.randn(6, 8, 4), torch.arange(32).view(8, 4) % 4 + 1
    model = nn.Sequential(mlp(4, 16, 5), nn.LogSoftmax(-1))
    return {"model": model, "batch": batch, "loss_fn": loss}
