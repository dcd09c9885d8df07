"""The loss: its value, its shape, its parts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import regression


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
