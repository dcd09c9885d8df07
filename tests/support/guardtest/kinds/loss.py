"""The value, shape and parts of the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import classification, mlp, regression


@case("loss-raises", "error", "loss", says="no such weighting")
def loss_raises(faulty: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if faulty:
            raise KeyError("no such weighting")
        return functional.mse_loss(output, target)

    return regression(loss_fn=loss)


@case("loss-shape", "error", "loss", says="shape [8, 1]")
def loss_shape(faulty: bool) -> Setup:
    return regression(loss_fn=nn.MSELoss(reduction="none" if faulty else "mean"))


@case("loss-detached", "error", "loss")
def loss_detached(faulty: bool) -> Setup:
    return regression(
        loss_fn=lambda output, target: functional.mse_loss(
            output.detach() if faulty else output, target
        )
    )


@case("nonfinite-loss", "error", "loss", where="distance", says="aten.log.default")
def nonfinite_loss(faulty: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        distance = ((output - output) + (0.0 if faulty else 1.0)).log().mean()
        return {"fit": functional.mse_loss(output, target), "distance": distance}

    return regression(loss_fn=loss)


@case("large-loss", "warning", "loss")
def large_loss(faulty: bool) -> Setup:
    factor = 1e6 if faulty else 1.0
    return regression(loss_fn=lambda output, target: factor * functional.mse_loss(output, target))


@case("loss-parts", "warning", "loss", where="prior")
def loss_parts(faulty: bool) -> Setup:
    factor = 1e-6 if faulty else 1.0

    def loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        prior = factor * (output.square().mean() + 0.1)
        return {"fit": functional.mse_loss(output, target), "prior": prior}

    return regression(loss_fn=loss)


@case("sum-reduction", "warning", "loss")
def sum_reduction(faulty: bool) -> Setup:
    return regression(loss_fn=nn.MSELoss(reduction="sum" if faulty else "mean"))


@case("activated-twice", "error", "loss", where="cross_entropy", says="cannot fall below 0.551")
def activated_twice(faulty: bool) -> Setup:
    end = nn.Softmax(1) if faulty else nn.Identity()
    return classification(model=nn.Sequential(mlp(4, 16, 3), end))


@case("wrong-form", "error", "loss", where="input of nll_loss", says="not 1")
def wrong_form(faulty: bool) -> Setup:
    end = nn.Identity() if faulty else nn.LogSoftmax(1)
    return classification(model=nn.Sequential(mlp(4, 16, 3), end), loss_fn=nn.NLLLoss())


@case("wrong-axis", "error", "forward", where="1 (LogSoftmax)", says="is the batch of 8 samples")
def wrong_axis(faulty: bool) -> Setup:
    end = nn.LogSoftmax(0 if faulty else 1)
    return classification(model=nn.Sequential(mlp(4, 16, 3), end), loss_fn=nn.NLLLoss())


@case("swapped-arguments", "error", "loss", where="kl_div", says="got probabilities as input")
def swapped_arguments(faulty: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        pair = (target, output) if faulty else (output, target)
        return functional.kl_div(*pair, reduction="batchmean")

    batch = torch.randn(8, 4), torch.rand(8, 3).softmax(1)
    model = nn.Sequential(mlp(4, 16, 3), nn.LogSoftmax(1))
    return {"model": model, "batch": batch, "loss_fn": loss}


@case("unaligned-targets", "error", "loss", where="target of ctc_loss", says="4 labels for 3 time")
def unaligned_targets(faulty: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        steps = (3 if faulty else 6,) * 8
        return functional.ctc_loss(output, target, steps, (4,) * 8, zero_infinity=True)

    batch = torch.randn(6, 8, 4), torch.arange(32).view(8, 4) % 4 + 1
    model = nn.Sequential(mlp(4, 16, 5), nn.LogSoftmax(-1))
    return {"model": model, "batch": batch, "loss_fn": loss}
