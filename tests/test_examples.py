"""The scripts and the notebook of docs/examples run from start to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guardtest import require

EXAMPLES = Path(__file__).resolve().parents[1] / "docs/examples"


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.stem)
def test_script(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda notebook: notebook.stem
)
def test_notebook(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that raises, as by an assert, fails the test."""
    nbformat, nbclient = require("nbformat"), require("nbclient")
    require("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    content = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(
        content, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert sum(len(cell.get("outputs", ())) for cell in content.cells) >= 4
