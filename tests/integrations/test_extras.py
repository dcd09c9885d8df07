"""Errors that ask the user for a missing framework or for a process group."""

import importlib
import sys

import pytest

from fastguard.integrations.shared import default_group


@pytest.mark.parametrize(
    "module, framework, extra",
    [
        ("accelerate", "accelerate", "huggingface"),
        ("huggingface", "transformers", "huggingface"),
        ("lightning", "lightning", "lightning"),
        ("fabric", "lightning", "lightning"),
    ],
)
def test_the_error_names_the_extra_to_install(monkeypatch, module, framework, extra):
    for name in list(sys.modules):
        if name == framework or name.startswith(f"{framework}."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, framework, None)  # makes the import fail
    monkeypatch.delitem(sys.modules, f"fastguard.integrations.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"{framework}\S* is not installed") as raised:
        importlib.import_module(f"fastguard.integrations.{module}")
    assert f"pip install 'torch-fastguard[{extra}]'" in str(raised.value)


def test_ranks_without_replicas_need_a_group():
    with pytest.raises(ValueError, match="pass group= to the guard"):
        default_group({}, 4, replicated=False)
    assert default_group({"group": None}, 4, replicated=False) == {}
