"""Methods of one object, replaced until they are given back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any


class TakenOver:
    """Methods of one object, replaced by those of the same names of another object.

    What was replaced is looked up when it is called, not held, so that copies and pickles of both
    objects belong together as the originals do.

    Args:
        owner: Whose methods are replaced, on this object alone.
        by: The object that has the new ones.
        names: Of the methods.

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
        self.owner, self.by, self.names = owner, by, names
        self._of_instance = {name: vars(owner)[name] for name in names if name in vars(owner)}
        self.take()

    def take(self) -> None:
        """The owner has the methods of the other object, whatever was put there meanwhile."""
        for name in self.names:
            setattr(self.owner, name, getattr(self.by, name))

    def own(self, name: str) -> Callable[..., Any]:
        """The method that was replaced."""
        if name in self._of_instance:
            return self._of_instance[name]
        return MethodType(getattr(type(self.owner), name), self.owner)

    def give_back(self) -> None:
        """The owner has its own methods again."""
        for name in self.names:
            vars(self.owner).pop(name, None)
        vars(self.owner).update(self._of_instance)
