"""Replaces methods of an object until they are restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any


class ReplacedMethods:
    """Replaces methods of one object with methods of the same names of another object.

    The original methods are looked up when they are called, not stored. In a copy or a pickle of
    both objects, each copy therefore refers to the other copy.

    Args:
        owner: The object whose methods are replaced, on this instance only.
        by: The object with the new methods.
        names: Names of the methods.

    Example:
        >>> class Trainer:
        ...     def step(self):
        ...         return "step"
        >>> class Guard:
        ...     def __init__(self, trainer):
        ...         self.replaced = ReplacedMethods(trainer, self, ["step"])
        ...
        ...     def step(self):
        ...         return "guarded " + self.replaced.original("step")()
        >>> trainer = Trainer()
        >>> guard = Guard(trainer)
        >>> trainer.step()
        'guarded step'
        >>> guard.replaced.restore()
        >>> trainer.step()
        'step'
    """

    def __init__(self, owner: object, by: object, names: Sequence[str]) -> None:
        self.owner: object = owner
        self.by: object = by
        self.names: Sequence[str] = names
        self._of_instance = {name: vars(owner)[name] for name in names if name in vars(owner)}
        self.install()

    def install(self) -> None:
        """Installs the new methods, also if other methods have replaced them since."""
        for name in self.names:
            setattr(self.owner, name, getattr(self.by, name))

    def original(self, name: str) -> Callable[..., Any]:
        """Returns the original method."""
        if name in self._of_instance:
            return self._of_instance[name]
        return MethodType(getattr(type(self.owner), name), self.owner)

    def restore(self) -> None:
        """Restores the owner's methods."""
        for name in self.names:
            vars(self.owner).pop(name, None)
        vars(self.owner).update(self._of_instance)
