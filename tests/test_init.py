"""The public names: what `fastguard` exports, and `__all__` lists by topic."""

from types import ModuleType

import fastguard


def test_all_lists_every_public_name_once():
    public = {
        name
        for name, value in vars(fastguard).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(fastguard.__all__) == public
    assert len(fastguard.__all__) == len(public)


def test_every_public_name_is_documented():
    assert [name for name in fastguard.__all__ if not getattr(fastguard, name).__doc__] == []
