"""Six small models without faults, each as a seeded `(model, (inputs, targets), loss_fn)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Setup = tuple[nn.Module, tuple[Any, Any], Callable[..., Any]]


def mlp() -> Setup:
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)
    )
    inputs = torch.randn(32, 16)
    return model, (inputs, inputs[:, :1].sin()), functional.mse_loss


class Residual(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and channels == out
        self.around: nn.Module = nn.Identity()
        if not same:
            self.around = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.branch(x) + self.around(x))


def resnet() -> Setup:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    for channels, out, stride in ((8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2)):
        layers.append(Residual(channels, out, stride))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return model, (torch.randn(8, 3, 32, 32), torch.randint(10, (8,))), nn.CrossEntropyLoss()


class UNet(nn.Module):
    """A U-Net with two levels."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels: int, out: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(4, out), nn.SiLU()
            )

        self.down = nn.ModuleList([block(3, 8), block(8, 16)])
        self.middle = block(16, 32)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)]
        )
        self.join = nn.ModuleList([block(32, 16), block(16, 8)])
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        finer = []
        for down in self.down:
            x = down(x)
            finer.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.middle(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), finer.pop()], dim=1))
        return self.head(x)


def unet() -> Setup:
    images = torch.rand(4, 3, 32, 32)
    return UNet(), (images, (images[:, :1] > 0.5).float()), nn.BCEWithLogitsLoss()


class GPT(nn.Module):
    """A decoder-only transformer, initialized with a standard deviation of 0.02."""

    def __init__(self, vocabulary: int = 64, width: int = 32, context: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        return self.head(self.norm(self.blocks(x, mask=self.mask, is_causal=True)))


def gpt() -> Setup:
    tokens = torch.randint(64, (8, 17))

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return GPT(), (tokens[:, :-1], tokens[:, 1:]), loss


class LSTM(nn.Module):
    """Classifies sequences by the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def lstm() -> Setup:
    inputs = torch.randn(16, 12, 8)
    return LSTM(), (inputs, torch.randint(4, (16,))), nn.CrossEntropyLoss()


class ViT(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.blocks(x)[:, 0])


def vit() -> Setup:
    return ViT(), (torch.randn(8, 3, 32, 32), torch.randint(10, (8,))), nn.CrossEntropyLoss()


HEALTHY: dict[str, Callable[[], Setup]] = {
    "mlp": mlp,
    "resnet": resnet,
    "unet": unet,
    "gpt": gpt,
    "lstm": lstm,
    "vit": vit,
}
