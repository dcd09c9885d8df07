# For `.ci/known_types.py`, which explains it.
from typing import Any

from torch.optim import Optimizer

class AcceleratedOptimizer(Optimizer):
    optimizer: Any
    def __getstate__(self) -> dict[str, Any]: ...
