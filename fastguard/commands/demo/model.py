"""A standard GPT, over bytes by default: pre-norm blocks and learned positions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


class Block(nn.Module):
    """Causal attention and an MLP, each pre-normalized and added to the residual stream."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm: nn.LayerNorm = nn.LayerNorm(width)
        self.qkv: nn.Linear = nn.Linear(width, 3 * width, bias=bias)
        self.project: nn.Linear = nn.Linear(width, width, bias=bias)
        self.mlp_norm: nn.LayerNorm = nn.LayerNorm(width)
        self.up: nn.Linear = nn.Linear(width, 4 * width, bias=bias)
        self.down: nn.Linear = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms the residual stream `(batch, time, width)`."""
        x = x + self.project(self._attend(self.attention_norm(x)))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(1, 3).unbind(1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class GPT(nn.Module):
    """Computes next-token logits `(batch, time, vocabulary)` from tokens `(batch, time)`.

    Set `bias` and `tied` (head tied to the embedding) for GPT-2.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        context: int,
        *,
        vocabulary: int = BYTES,
        bias: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.token: nn.Embedding = nn.Embedding(vocabulary, width)
        self.position: nn.Embedding = nn.Embedding(context, width)
        self.blocks: nn.Sequential = nn.Sequential(
            *[Block(width, heads, bias=bias) for _ in range(layers)]
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(width)
        self.head: nn.Linear = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:  # as GPT-2: residual projections start smaller
                adds = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if adds else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Computes the logits."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, `()`."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())
