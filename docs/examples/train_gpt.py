"""A small GPT with a guard, as docs/tutorial.md builds it step by step."""

import torch
from torch import nn
from torch.nn import functional as F

import fastguard

torch.manual_seed(0)
VOCAB, CONTEXT, WIDTH = 64, 32, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        qkv = self.qkv(self.ln1(x)).chunk(3, dim=2)
        q, k, v = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens):
        return self.head(self.blocks(self.wte(tokens) + self.wpe.weight))


data = torch.arange(20_000) ** 2 % 61  # "text" that a small GPT can learn
quality = torch.ones(20_000)  # a weight for each token, from a data pipeline
quality[7_000:7_010] = float("nan")  # one bad document
quality[9_010] = 1e4  # a weight in the wrong unit
quality[11_000:11_200] = float("nan")  # a bad stretch


def get_batch(step):
    starts = torch.arange(4) * CONTEXT + step * 100
    where = starts[:, None] + torch.arange(CONTEXT)
    return data[where], data[where + 1], quality[where + 1]


model = GPT()
optimizer = fastguard.GuardedOptimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    max_norm=1.0,
    spike=fastguard.SpikeRule(sigma=6.0),
    named_parameters=model.named_parameters(),
)
optimizer.add_sink("run/records.jsonl")
rollback = fastguard.Rollback(optimizer, {"model": model}, every=20, after_skips=3)

step, leave_out = -1, set()
while step < 149:
    step += 1
    if step in leave_out:
        continue
    tokens, targets, weights = get_batch(step)
    losses = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).mean()
    loss.backward()
    optimizer.step(loss=loss, tag=step)
    optimizer.zero_grad(set_to_none=True)
    rewind = rollback.step(position=step)
    if rewind is not None:
        print(f"back to step {rewind.position + 1}: {rewind.reason}")
        step = rewind.position
        leave_out.update(rewind.skip)
        continue
    if step % 25 == 24:
        print(f"step {step + 1}: loss {loss.item():.3f}")
