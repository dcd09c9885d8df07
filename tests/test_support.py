"""The rules of the test suite: in CI, a missing module fails instead of skipping tests."""

import sys

import pytest
import torch

from guardtest import require


def test_require_returns_an_installed_module():
    assert require("torch") is torch


@pytest.mark.parametrize("module", ["guardtest_missing", "guardtest.missing"])
def test_a_missing_module_skips_on_a_users_machine(monkeypatch, module):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        require(module)


def test_a_missing_module_fails_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must test with it"):
        require("guardtest_missing")


def test_a_module_that_raises_on_import_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "guardtest_broken.py").write_text("import guardtest_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "guardtest_broken", raising=False)
    with pytest.raises(ModuleNotFoundError, match="guardtest_missing"):
        require("guardtest_broken")


def test_every_test_starts_from_the_same_seed(seed):
    drawn = torch.rand(3)
    torch.manual_seed(seed)
    assert torch.equal(drawn, torch.rand(3))
