"""A small classifier with BatchNorm, whose statistics can be frozen, and its EMA."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastguard.commands.demo.incidents.classifier_data import CLASSES, SIZE

EMA_DECAY = 0.9


class Classifier(nn.Module):
    """Maps images `(B, 1, SIZE, SIZE)` to scores `(B, CLASSES)`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn: nn.BatchNorm2d = nn.BatchNorm2d(width)
        self.head: nn.Linear = nn.Linear(width * (SIZE // 2) ** 2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Computes the scores."""
        features = self.bn(self.conv(images)).relu()
        return self.head(nn.functional.max_pool2d(features, 2).flatten(1))

    def train_with(self, frozen_statistics: bool) -> None:
        """Sets training mode; if frozen, BatchNorm uses its running statistics unchanged."""
        self.train()
        self.bn.train(not frozen_statistics)


def averaged(model: Classifier) -> AveragedModel:
    """An exponential moving average of weights and statistics."""
    average = get_ema_multi_avg_fn(EMA_DECAY)
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
