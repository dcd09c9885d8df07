"""Gradients: missing, zero, vanishing, exploding, non-finite."""

from __future__ import annotations

from torch import Tensor, nn

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import Between, around, mlp, regression


@case("backward-raises", "error", "backward", says="modified by an inplace operation")
def backward_raises(faulty: bool) -> Setup:
    def overwrite(x: Tensor) -> Tensor:
        y = x.clamp_max(0.0).exp()  # backward needs the output of exp
        if faulty:
            y += 1
        return y

    return regression(around(overwrite))


@case("nonfinite-gradient", "error", "backward", where="1 (Between)", says="SqrtBackward0")
def nonfinite_gradient(faulty: bool) -> Setup:
    return regression(around(lambda x: ((x * 0) + (0.0 if faulty else 1.0)).sqrt() + x))


@case("all-gradients-zero", "error", "backward")
def all_gradients_zero(faulty: bool) -> Setup:
    model = mlp(4, 16, 1)
    return regression(nn.Sequential(model, Between(lambda y: y.clamp(7, 8) if faulty else y)))


@case("no-gradient", "error", "backward", where="extra", says="2 of 6 parameters")
def no_gradient(faulty: bool) -> Setup:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.extra = nn.Linear(4, 16), nn.Linear(16, 1), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x) + (0.0 if faulty else self.extra(x))

    return regression(TwoHeads())


@case("zero-gradient", "warning", "backward", where="0.weight")
def zero_gradient(faulty: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.constant_(model[0].bias, -100.0 if faulty else 0.0)  # every ReLU is dead
    return regression(model)


@case("vanishing-gradient", "warning", "backward", where="0.weight", says="over 12 layers")
def vanishing_gradient(faulty: bool) -> Setup:
    model = mlp(4, *[16] * 11, 1, activation=nn.Sigmoid)
    if not faulty:
        model = mlp(4, *[16] * 11, 1, activation=nn.SiLU)
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight)
    return regression(model)


@case("exploding-gradient", "warning", "backward")
def exploding_gradient(faulty: bool) -> Setup:
    model = mlp(4, *[16] * 5, 1)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=1.0 if faulty else 0.3)
    return regression(model)
