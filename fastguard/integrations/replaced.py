"""Methods of one object, replaced for a while or for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any


@contextmanager
def replaced(owner: object, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Replaces `owner.name` on that object alone; other objects of its class keep theirs.

    Example:
        >>> from types import SimpleNamespace
        >>> owner = SimpleNamespace(answer=lambda: 41)
        >>> with replaced(owner, "answer", lambda: 42):
        ...     owner.answer()
        42
        >>> owner.answer()
        41
    """
    own = vars(owner).get(name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


class TakenOver:
    """Methods of one object, replaced for good by those of the same names of another object.

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
        >>> _ = Guard(trainer)
        >>> trainer.step()
        'guarded step'
    """

    def __init__(self, owner: object, by: object, names: Sequence[str]) -> None:
        self.owner = owner
        self._of_instance = {name: vars(owner)[name] for name in names if name in vars(owner)}
        for name in names:
            setattr(owner, name, getattr(by, name))

    def own(self, name: str) -> Callable[..., Any]:
        """The method that was replaced."""
        if name in self._of_instance:
            return self._of_instance[name]
        return MethodType(getattr(type(self.owner), name), self.owner)
