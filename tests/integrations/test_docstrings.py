"""The examples in docstrings of the integrations, and on their pages, run unchanged."""

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import fastguard.integrations
from guardtest import require

DOCS = Path(__file__).parents[2] / "docs"
NEEDS = {
    "huggingface": ("transformers",),
    "incidents/a": ("ultralytics",),
    "lightning": ("lightning",),
    "loggers": ("mlflow", "wandb"),
    "ultralytics": ("ultralytics",),
}
"""The pages that need frameworks, with these frameworks; tests/test_docs.py skips them."""

MODULES = [m.name for m in pkgutil.iter_modules(fastguard.integrations.__path__)]
BLOCKS = [
    pytest.param(block, NEEDS[page], id=f"{page}-{i}")
    for page in NEEDS
    for i, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.S | re.M)
    )
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    for framework in ("accelerate", "lightning", "transformers", "ultralytics"):
        require(framework)
    module = importlib.import_module(f"fastguard.integrations.{name}")
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("block, frameworks", BLOCKS)
def test_page_runs(block, frameworks, tmp_path, monkeypatch):
    for framework in frameworks:
        require(framework)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "block.py"
    script.write_text(block)
    runpy.run_path(str(script), run_name="__main__")
