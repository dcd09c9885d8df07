"""README.md: its code runs, its links lead somewhere, its figures are the measured ones.

The same holds for the figures of docs/benchmarks.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs/benchmarks.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
RESULTS = json.loads((ROOT / "benchmarks/results/cpu-amd-epyc-2-cores.json").read_text())["rows"]
RATIOS = {(row["case"], row["contender"]): row["ratio"]["p50"] for row in RESULTS}
MILLISECONDS = {(row["case"], row["contender"]): row["ms"]["p50"] for row in RESULTS}
STEP = "gpt2-124m fp32, AdamW fused, {}"
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md")
    for page in sorted(ROOT.glob(pattern))
]


def links(page: Path) -> set[Path]:
    """The files that a page leads to."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    return {(page.parent / t).resolve() for t in targets if not t.startswith("http")}


def contenders(label: str, before: str) -> tuple[str, list[str]]:
    """The case of a line of the table of speeds, and the contenders of its figures."""
    if not label.startswith("the same"):
        return re.sub(r"(bf16|fp32).*", r"\1", label), ["fastguard"]
    return before, ["fastguard flat", "fastguard flat trusted"][: 1 + label.count("trusted")]


def test_readme_can_be_read_in_a_few_minutes() -> None:
    assert len(BLOCKS) >= 1
    assert len(README.read_text().split()) < 1200


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_block_runs(block: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_first_example_prints_what_the_page_says(tmp_path: Path) -> None:
    after = README.read_text().split(BLOCKS[0])[1]
    shown = re.findall(r"^```text\n(.*?)^```", after, re.DOTALL | re.MULTILINE)[0]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS[0]], cwd=tmp_path, capture_output=True, text=True
    )
    for line, wanted in zip(done.stdout.splitlines(), shown.splitlines(), strict=True):
        assert line.startswith(wanted.removesuffix("...")), (line, wanted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if not target.exists()] == []


def test_every_page_is_two_clicks_from_the_readme() -> None:
    """The pages of the API reference are three clicks away."""
    reachable = links(README) | links(ROOT / "docs/index.md") | links(ROOT / "docs/api/index.md")
    assert [page for page in PAGES if page not in reachable | {README}] == []


@pytest.mark.parametrize(("page", "least"), [(README, 6), (BENCHMARKS, 18)])
def test_the_table_of_speeds_holds_the_committed_results(page: Path, least: int) -> None:
    table = page.read_text().split("| gradients | nothing to clip | clipping |\n|---|---|---|\n")[1]
    case, n_figures = "", 0
    for line in table.split("\n\n")[0].splitlines():
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        case, names = contenders(label, case)
        for situation, cell in zip(("nothing to clip", "clipping"), cells, strict=True):
            for name, shown in zip(names, cell.split(" / "), strict=True):
                decimals = len(shown.rstrip("x").partition(".")[2])
                ratio = RATIOS[f"{case}, {situation}", name]
                assert shown == f"{ratio:.{decimals}f}x", (case, situation, name)
                n_figures += 1
    assert n_figures >= least


def test_the_cost_of_a_step_is_the_measured_one() -> None:
    idle = {name: MILLISECONDS[STEP.format("nothing to clip"), name] for name in CONTENDERS}
    clips = {name: MILLISECONDS[STEP.format("clipping"), name] for name in CONTENDERS}
    bare, clip, guarded, flat = (idle[name] for name in CONTENDERS)
    page = " ".join(BENCHMARKS.read_text().split())
    for shown in (
        f"bare step | {bare:.1f} |",
        f"then step | {clip:.1f} |",
        f"guarded step | {guarded:.1f} |",
        f"`flat_buckets=True` | {flat:.1f} |",
        f"adds {guarded - bare:.1f} ms",
        f"`clip_grad_norm_` adds {clip - bare:.1f} ms",
        f"guarded step ({clips['GuardedOptimizer']:.1f} ms)",
        f"and a step ({clips['clip + step']:.1f} ms)",
    ):
        assert shown in page, shown
    readme = " ".join(README.read_text().split())
    shown = f"takes {bare:.0f} ms bare, {clip:.0f} ms with `clip_grad_norm_`, and {guarded:.0f} ms"
    assert shown in readme


CONTENDERS = ("bare step", "clip + step", "GuardedOptimizer", "GuardedOptimizer flat")


def test_no_line_installs_the_unrelated_package_of_the_same_name() -> None:
    for page in PAGES:
        assert not re.search(r"pip install\s+[\"']?fastguard\b", page.read_text()), page
