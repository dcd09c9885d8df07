"""A model for flat gradient buffers, and checks of the positions of its gradients."""

import torch
from torch import nn


def model_of(channels_last=False):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5), nn.Linear(5, 1)
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(2, 3, 6, 6, generator=generator)).square().mean().backward()


def attached(flat):
    """Whether every gradient is in its slot."""
    spans = [(b.flat.data_ptr(), b.flat.data_ptr() + b.flat.nbytes) for b in flat.buffers]
    return all(
        p.grad is not None and any(a <= p.grad.data_ptr() < z for a, z in spans)
        for p in flat.parameters
        if p.numel()
    )


def gaps(flat):
    """The padding between the slots of each buffer that has padding."""
    between = []
    for buffer in flat.buffers:
        free = torch.ones(len(buffer.flat), dtype=torch.bool)
        for i in buffer.ids:
            start = flat.views[i].storage_offset()
            free[start : start + flat.parameters[i].numel()] = False
        between.append(buffer.flat[free])
    return [g for g in between if len(g)]
