"""Values that 16-bit formats cannot represent."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import Between, around, regression, with_sgd


@case("float16-range", "error", "precision", where="0 (Linear)", says="not the model")
def float16_range(faulty: bool) -> Setup:
    autocast = torch.autocast("cpu", torch.float16 if faulty else torch.bfloat16)
    model = nn.Sequential(nn.Linear(4, 16), Between(lambda x: x * 1e-5), nn.Linear(16, 1))
    nn.init.constant_(model[0].bias, 1e5)
    return regression(model, autocast=autocast)


@case("float16-overflow", "warning", "precision", where="1 (Between)", says="65504")
def float16_overflow(faulty: bool) -> Setup:
    return regression(around(lambda x: x * (1e6 if faulty else 1e3)))


@case("float16-underflow", "note", "precision")
def float16_underflow(faulty: bool) -> Setup:
    factor = 1e-9 if faulty else 1.0
    return regression(loss_fn=lambda output, target: factor * functional.mse_loss(output, target))


@case("precision-loss", "warning", "precision", says="bfloat16")
def precision_loss(faulty: bool) -> Setup:
    # A difference of large numbers, of which bfloat16 keeps only eight bits.
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            large = self.layer(x) + (300.0 if faulty else 0.0)
            if torch.is_autocast_enabled("cpu"):
                large = large.bfloat16()
            return large.float() - (300.0 if faulty else 0.0)

    return regression(Difference(), autocast=torch.autocast("cpu", torch.bfloat16))


@case("rounded-update", "warning", "precision", where="weight", says="bfloat16")
def rounded_update(faulty: bool) -> Setup:
    setup = regression(nn.Linear(4, 1))
    if faulty:
        setup["model"].bfloat16()
        setup["batch"] = tuple(t.bfloat16() for t in setup["batch"])
    return with_sgd(setup, lr=1e-5)
