"""Replaces methods of an object until they are given back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any


class TakenOver:
    """Replaces methods of one object with methods of the same names of another object.

    The replaced methods are looked up when called, not stored, so that copies and pickles of both
    objects refer to each other like the originals.

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
        ...         self.trainers = TakenOver(trainer, self, ["step"])
        ...
        ...     def step(self):
        ...         return "guarded " + self.trainers.own("step")()
        >>> trainer = Trainer()
        >>> guard = Guard(trainer)
        >>> trainer.step()
        'guarded step'
        >>> guard.trainers.give_back()
        >>> trainer.step()
        'step'
    """

    def __init__(self, owner: object, by: object, names: Sequence[str]) -> None:
        self.owner: object = owner
        self.by: object = by
        self.names: Sequence[str] = names
        self._of_instance = {name: vars(owner)[name] for name in names if name in vars(owner)}
        self.take()

    def take(self) -> None:
        """Installs the other object's methods, whatever replaced them meanwhile."""
        for name in self.names:
            setattr(self.owner, name, getattr(self.by, name))

    def own(self, name: str) -> Callable[..., Any]:
        """Returns the method that was replaced."""
        if name in self._of_instance:
            return self._of_instance[name]
        return MethodType(getattr(type(self.owner), name), self.owner)

    def give_back(self) -> None:
        """Restores the owner's methods."""
        for name in self.names:
            vars(self.owner).pop(name, None)
        vars(self.owner).update(self._of_instance)
