"""A small DeepSDF: one decoder for all shapes, and a table with a latent code per shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastguard.commands.demo.incidents.latent_codes_data import SHAPES


class AutoDecoder(nn.Module):
    """Computes the signed distance of a point, given the code of a shape.

    Args:
        code: Width of a code.
        width: Width of the hidden layers.
    """

    def __init__(self, code: int = 8, width: int = 32) -> None:
        super().__init__()
        self.codes: nn.Embedding = nn.Embedding(SHAPES, code)
        self.decoder: nn.Sequential = nn.Sequential(
            nn.Linear(code + 2, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 1),
        )
        nn.init.normal_(self.codes.weight, std=0.01)

    def forward(self, shapes: Tensor, points: Tensor) -> Tensor:
        """Distances `(n, P)` of points `(n, P, 2)` for shapes `(n,)`."""
        codes = self.codes(shapes)[:, None].expand(-1, points.shape[1], -1)
        return self.decoder(torch.cat([codes, points], dim=2))[..., 0]


def losses(model: AutoDecoder, shapes: Tensor, points: Tensor, sdf: Tensor) -> dict[str, Tensor]:
    """Mean squared error of the distances, and the prior that keeps codes small."""
    return {
        "sdf": nn.functional.mse_loss(model(shapes, points), sdf),
        "prior": 1e-4 * model.codes(shapes).square().sum(dim=1).mean(),
    }
