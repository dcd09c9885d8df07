"""Checks the installed versions for tests, as `fastguard.errors.versions` does for the package."""

from importlib import metadata

import pytest

from fastguard.errors.versions import TORCH, Feature, numbers_of


def has_torch(*version: int) -> bool:
    """Whether the installed torch is this version, such as `2, 10`, or a newer one."""
    return version <= TORCH


def has_triton(*version: int) -> bool:
    """Whether the installed triton is this version or a newer one."""
    return version <= numbers_of(metadata.version("triton"))


def needs_torch(major: int, minor: int, why: str) -> pytest.MarkDecorator:
    """Skips a test on an older torch."""
    return pytest.mark.skipif(
        not has_torch(major, minor), reason=f"torch {major}.{minor} and newer: {why}"
    )


def needs(feature: Feature) -> pytest.MarkDecorator:
    """Skips the test of a feature that the installed torch lacks."""
    return needs_torch(*feature.since, feature.name)
