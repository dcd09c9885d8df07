"""Every example in a docstring runs unchanged."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import fastguard
from guardtest.gloo_groups import end_groups

# tests/integrations and tests/kernels test the first two; importing the last one runs the command.
ELSEWHERE = ("fastguard.integrations.", "fastguard.kernels", "fastguard.__main__")


def modules() -> list[str]:
    names = ["fastguard"]
    for module in pkgutil.walk_packages(
        fastguard.__path__, "fastguard.", onerror=lambda name: None
    ):
        if not module.name.startswith(ELSEWHERE):
            names.append(module.name)
    return names


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", modules())
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.distributed.destroy_process_group", end_groups)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for test in examples(importlib.import_module(name)):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize(
    "name",
    [
        "clip_grad_norm_",
        "get_total_norm",
        "clip_grads_with_norm_",
        "clip_grad_value_",
        "sanitize_grads_",
        "measure_grads",
        "backend_for",
        "patch_torch",
        "SpikeRule",
        "Threshold",
        "GuardedOptimizer",
        "FlatGradBuckets",
    ],
)
def test_important_public_names_have_an_example(name):
    documented = getattr(fastguard, name)
    assert doctest.DocTestParser().get_examples(documented.__doc__), name
