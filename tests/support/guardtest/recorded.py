"""Guards for tests of records, and a device that sends its records late."""

from __future__ import annotations

import torch

from fastguard import GuardedOptimizer


def guard(n=1, size=4, **options):
    parameters = [torch.nn.Parameter(torch.zeros(size)) for _ in range(n)]
    for p in parameters:
        p.grad = torch.ones(size)
    names = [(f"layer.{i}.weight", p) for i, p in enumerate(parameters)]
    inner = torch.optim.SGD(parameters, lr=0.5)
    return parameters, GuardedOptimizer(inner, named_parameters=names, **options)


class SlowArrival:
    """Replaces the event of a device that has not finished."""

    def __init__(self):
        self.waited = 0

    def has_arrived(self):
        return bool(self.waited)

    def wait(self):
        self.waited += 1
