"""A small U-Net with four heads (mask, boundary, contour, distance) and their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

HEADS = ("seg", "boundary", "contour", "distance")
SLIDE_PIXELS = 3  # pixels of the scanned slide per pixel of the image


def divided(slope: Tensor) -> Tensor:
    """The original normalization of slopes `(B, 2, H, W)`; 0/0 where the image is constant."""
    return slope / slope.norm(dim=1, keepdim=True)


def masked(slope: Tensor) -> Tensor:
    """A fix that fails: its values are finite, but the backward pass computes 0 * Inf."""
    norm = slope.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, slope / norm, 0.0)


def floored(slope: Tensor) -> Tensor:
    """The fix that works."""
    return functional.normalize(slope, dim=1, eps=1e-6)


class Attention(nn.Module):
    """Self-attention over all positions, without the usual 1 / sqrt(channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query: nn.Conv2d = nn.Conv2d(channels, channels, 1)
        self.key: nn.Conv2d = nn.Conv2d(channels, channels, 1)
        self.value: nn.Conv2d = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Adds the attended values to features `(B, C, H, W)`."""
        query, key, value = (m(x).flatten(2) for m in (self.query, self.key, self.value))
        weights = (query.transpose(1, 2) @ key).softmax(dim=2)
        return x + (value @ weights.transpose(1, 2)).view_as(x)


class BoundaryRefinement(nn.Module):
    """Predicts the boundary from features and the direction of the image gradient."""

    def __init__(self, channels: int, direction: Callable[[Tensor], Tensor] = divided) -> None:
        super().__init__()
        self.direction = direction
        self.slope: nn.Conv2d = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.mix: nn.Conv2d = nn.Conv2d(channels + 2, 1, 1)
        sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        self.slope.weight.data = torch.stack([sobel, sobel.T])[:, None].contiguous()

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """Computes boundary logits `(B, 1, H, W)`."""
        return self.mix(torch.cat([features, self.direction(self.slope(image))], dim=1))


class ActiveContour(nn.Module):
    """A level set from features and raw pixel coordinates, which make its gradients huge."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.level: nn.Conv2d = nn.Conv2d(channels + 2, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Computes the level set `(B, 1, H, W)`."""
        n, _, height, width = features.shape
        rows = torch.arange(height, device=features.device) * float(SLIDE_PIXELS)
        columns = torch.arange(width, device=features.device) * float(SLIDE_PIXELS)
        pixels = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        return self.level(torch.cat([features, pixels.expand(n, -1, -1, -1)], dim=1))


class UNet(nn.Module):
    """Maps images `(B, 1, H, W)` to a dict of maps `(B, 1, H, W)` float32, one per head.

    Args:
        direction: Normalization of the boundary refinement; the original run used `divided`.
        width: Number of channels at full resolution.
    """

    def __init__(self, direction: Callable[[Tensor], Tensor] = divided, width: int = 8) -> None:
        super().__init__()
        self.down: nn.Module = _block(1, width)
        self.bottom: nn.Module = _block(width, 2 * width)
        self.attention: Attention = Attention(2 * width)
        self.up: nn.Module = _block(3 * width, width)
        self.seg: nn.Conv2d = nn.Conv2d(width, 1, 1)
        self.boundary: BoundaryRefinement = BoundaryRefinement(width, direction)
        self.contour: ActiveContour = ActiveContour(width)
        self.distance: nn.Conv2d = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Computes the four maps."""
        fine = self.down(image)
        coarse = self.attention(self.bottom(functional.max_pool2d(fine, 4)))
        features = self.up(torch.cat([fine, functional.interpolate(coarse, scale_factor=4)], 1))
        maps = {
            "seg": self.seg(features),
            "boundary": self.boundary(features, image),
            "contour": self.contour(features),
            "distance": self.distance(features),
        }
        return {name: values.float() for name, values in maps.items()}


def _block(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU())


def losses(maps: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The four parts of the loss, scalars by name of the head."""
    crossed = functional.binary_cross_entropy_with_logits
    return {
        "seg": crossed(maps["seg"], targets["mask"]),
        "boundary": crossed(maps["boundary"], targets["boundary"]),
        "contour": functional.l1_loss(maps["contour"], targets["level"]),
        "distance": 0.1 * functional.mse_loss(maps["distance"], targets["distance"]),
    }
