"""What to install when a framework is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of a framework: a missing one names the extra that brings it.

    Args:
        extra: Name of the extra in pyproject.toml.

    Raises:
        ModuleNotFoundError: With the command that installs the extra.

    Example:
        >>> with needs("lightning"):
        ...     import no_such_framework
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: no_such_framework is not installed; run: pip install
        'torch-fastguard[lightning]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed; run: pip install 'torch-fastguard[{extra}]'",
            name=error.name,
        ) from error
