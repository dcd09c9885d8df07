"""A model whose parameters are DTensors."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor


def build(mesh: DeviceMesh, seed: int = 0) -> tuple[torch.nn.Sequential, torch.optim.AdamW]:
    """Returns a linear layer with a batch norm, and its optimizer; the buffers are not sharded."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    for layer in model:
        for name, p in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, torch.nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
