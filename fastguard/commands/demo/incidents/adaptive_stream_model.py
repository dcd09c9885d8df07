"""AdaptiveStream: one encoder, a mask and a class; the original and the repaired model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastguard.commands.demo.incidents.adaptive_stream_data import COLORS, SIZE

CHANNELS = 16
PARTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mask": functional.binary_cross_entropy_with_logits,
    "label": functional.cross_entropy,
}


class Attention(nn.Module):
    """Normalizes features `(B, C, H, W)` to unit length per position, gated by the image.

    Args:
        eps: Lower bound of the length. The original run used 0, which gives 0/0 on black.
    """

    def __init__(self, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """Normalizes the features and applies the gate."""
        length = (features.square().sum(dim=1, keepdim=True) + self.eps).sqrt()
        unit = features / length
        return unit * unit.mean(dim=(2, 3), keepdim=True).sigmoid()


class AdaptiveStream(nn.Module):
    """Maps images `(B, 3, SIZE, SIZE)` to `mask`, logits, and `label`, scores `(B, colors)`.

    Args:
        attention: The attention module.
        mask_size: Pixels per side of the mask.
    """

    def __init__(self, attention: Attention, mask_size: int) -> None:
        super().__init__()
        self.encoder: nn.Sequential = nn.Sequential(
            nn.Conv2d(3, CHANNELS // 2, 4, stride=4, bias=False),
            nn.ReLU(),
            nn.Conv2d(CHANNELS // 2, CHANNELS, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )
        self.attention = attention
        self.decoder: nn.Sequential = nn.Sequential(
            nn.Conv2d(CHANNELS, 1, 3, padding=1), nn.Upsample(size=mask_size, mode="bilinear")
        )
        self.classifier: nn.Linear = nn.Linear(CHANNELS, len(COLORS))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Computes mask logits `(B, 1, M, M)` and class scores."""
        features = self.attention(self.encoder(images))
        return {
            "mask": self.decoder(features),
            "label": self.classifier(features.amax(dim=(2, 3))),
        }


def as_it_was() -> AdaptiveStream:
    """The original model: a 32 x 32 mask, no `eps` in a division, unit weights, an unused head."""
    model = AdaptiveStream(Attention(eps=0.0), mask_size=32)
    model.boundary = nn.Conv2d(CHANNELS, 1, 3)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def repaired() -> AdaptiveStream:
    """The model with the advice applied: a mask of the target's size, `eps`, Kaiming init."""
    model = AdaptiveStream(Attention(eps=1e-6), mask_size=SIZE)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def losses(output: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two parts of the loss, scalars."""
    return {name: part(output[name], targets[name]) for name, part in PARTS.items()}


@torch.no_grad()
def quality(output: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, float]:
    """Mask IoU and classification accuracy; NaN counts as wrong."""
    mask = functional.interpolate(output["mask"], targets["mask"].shape[-2:])
    found, real = mask > 0, targets["mask"] > 0
    scores = output["label"]
    chosen = scores.gather(1, targets["label"][:, None])[:, 0]
    return {
        "iou": ((found & real).sum() / (found | real).sum()).item(),
        "accuracy": (chosen >= scores.amax(dim=1)).float().mean().item(),
    }
