"""The code of README.md runs, its links exist, and its figures are the measured ones.

The figures of docs/benchmarks.md are checked too.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fastguard.commands.bench.results import load
from guardtest.bench import benchmarks

tables = benchmarks("tables")
ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
RESULT = load(tables.RESULT)
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md")
    for page in sorted(ROOT.glob(pattern))
]


def links(page: Path) -> set[Path]:
    """The files that a page links to."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    return {(page.parent / t).resolve() for t in targets if not t.startswith("http")}


def test_readme_is_short() -> None:
    assert len(BLOCKS) >= 1
    assert len(README.read_text().split()) < 1200


@functools.cache
def executed(block: str) -> subprocess.CompletedProcess[str]:
    """Runs a block of the page as a script, once."""
    with TemporaryDirectory() as folder:
        script = Path(folder, "block.py")
        script.write_text(block)
        command = [sys.executable, str(script)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_block_runs(block: str) -> None:
    done = executed(block)
    assert done.returncode == 0, done.stderr


def test_the_first_example_prints_what_the_page_says() -> None:
    after = README.read_text().split(BLOCKS[0])[1]
    shown = re.findall(r"^```text\n(.*?)^```", after, re.DOTALL | re.MULTILINE)[0]
    printed = executed(BLOCKS[0]).stdout
    for line, wanted in zip(printed.splitlines(), shown.splitlines(), strict=True):
        assert line.startswith(wanted.removesuffix("...")), (line, wanted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_link_targets_exist(page: Path) -> None:
    assert [target for target in links(page) if not target.exists()] == []


def test_every_page_is_two_clicks_from_the_readme() -> None:
    """The pages of the API reference are three clicks away."""
    reachable = links(README) | links(ROOT / "docs/index.md") | links(ROOT / "docs/api/index.md")
    assert [page for page in PAGES if page not in reachable | {README}] == []


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_speed_tables_contain_the_committed_results(page: Path) -> None:
    """`python -m benchmarks.tables --write` updates them."""
    text = page.read_text()
    assert tables.filled(text, RESULT) == text


def test_figures_in_the_speed_tables_belong_to_their_rows() -> None:
    """Computes one figure of each table independently of the code that wrote the tables."""
    ratios = {(row["case"], row["contender"]): row["ratio"]["p50"] for row in RESULT["rows"]}
    ms = {(row["case"], row["contender"]): row["ms"]["p50"] for row in RESULT["rows"]}
    step = "yolo11n fp32, AdamW fused, nothing to clip"
    base, flat = ms[step, "clip + step"], ms[step, "GuardedOptimizer flat parameters"]
    flat_buckets = ratios["5000 x 100 fp32, clipping", "fastguard flat"]
    bare = ms["gpt2-124m fp32, AdamW fused, clipping", "bare step"]
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert re.search(rf"\| yolo11n fp32 \| {base:.3g} ms \|.*\| {base / flat:.2f}x \|", text)
    assert re.search(rf"\| 5000 x 100 fp32, flat buckets \|.*\| {flat_buckets:.2f}x \|", text)
    assert re.search(rf"\| bare step \|.*\| {bare:.1f} \|", text)


def test_no_line_installs_the_unrelated_package_of_the_same_name() -> None:
    for page in PAGES:
        assert not re.search(r"pip install\s+[\"']?fastguard\b", page.read_text()), page
