"""A method of one object, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
