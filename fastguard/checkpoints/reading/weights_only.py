"""Lists what `torch.load(weights_only=True)`, torch's default, refuses in a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Iterable

import torch._weights_only_unpickler as unpickler

OPCODES: frozenset[bytes] = frozenset(
    code
    for name, code in vars(pickle).items()
    if isinstance(code, bytes) and len(code) == 1 and name.isupper() and hasattr(unpickler, name)
)
"""The opcodes that torch supports. torch's unpickler module imports each one by name."""

# torch accepts these names if torch.distributed.tensor or torch.nested is imported.
_OF_TORCH = ("torch.distributed.device_mesh.", "torch.distributed.tensor.", "torch.nested.")


def refused_names(names: Iterable[str]) -> list[str]:
    """Returns the classes and functions that torch refuses unless they are registered as safe.

    Example:
        >>> refused_names(["collections.OrderedDict", "numpy.dtype", "mylib.Settings"])
        ['numpy.dtype', 'mylib.Settings']
    """
    allowed = unpickler._get_allowed_globals().keys() | unpickler._get_user_allowed_globals().keys()
    return [name for name in names if name not in allowed and not name.startswith(_OF_TORCH)]
