"""A missing framework is named, with the extra that brings it."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    "module, framework, extra",
    [
        ("accelerate", "accelerate", "huggingface"),
        ("huggingface", "transformers", "huggingface"),
        ("lightning", "lightning", "lightning"),
        ("fabric", "lightning", "lightning"),
    ],
)
def test_what_to_install(monkeypatch, module, framework, extra):
    for name in list(sys.modules):
        if name == framework or name.startswith(f"{framework}."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, framework, None)  # to Python: not there
    monkeypatch.delitem(sys.modules, f"fastguard.integrations.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"{framework}\S* is not installed") as raised:
        importlib.import_module(f"fastguard.integrations.{module}")
    assert f"pip install 'torch-fastguard[{extra}]'" in str(raised.value)
