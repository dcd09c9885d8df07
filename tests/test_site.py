"""The site that `make docs` builds contains every page and every public name.

`make docs` itself checks links and anchors; MkDocs has a separate environment.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import fastguard

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NAVIGATION = set(re.findall(r"[\w/.-]+\.md\b", (ROOT / "mkdocs.yml").read_text()))
REFERENCE = {
    name
    for page in (DOCS / "api").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
}
OUTSIDE = {"changelog.md", "contributing.md", "measuring.md"}  # .ci/site_links.py adds them


def public_definitions(module: Path) -> set[str]:
    """The public names of a trainer's module, found without importing the framework."""
    parts = module.relative_to(ROOT).with_suffix("").parts
    home = ".".join(part for part in parts if part != "__init__")
    body = ast.parse(module.read_text()).body
    return {
        f"{home}.{node.name}"
        for node in body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and (node.name == "guard" or node.name.endswith(("GuardCallback", "Guard")))
        and not node.name.startswith("_")
    }


def test_every_public_name_is_in_the_reference() -> None:
    assert {f"fastguard.{name}" for name in fastguard.__all__} - REFERENCE == set()


def test_every_integration_is_in_the_reference() -> None:
    folder = ROOT / "fastguard/integrations"
    modules = [m for m in folder.rglob("*.py") if m.name not in ("shared.py", "replaced.py")]
    wanted = set().union(*(public_definitions(module) for module in modules))
    assert len(wanted) >= 8
    assert wanted - REFERENCE == set()


def test_every_public_name_of_a_documented_module_is_in_the_reference() -> None:
    """Covers fastguard.optim, whose names are not in `fastguard.__all__`."""
    import fastguard.optim

    names = getattr(fastguard.optim, "__all__", [])
    assert {f"fastguard.optim.{name}" for name in names} - REFERENCE == set()


def test_every_page_is_in_the_navigation() -> None:
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages | OUTSIDE == NAVIGATION


def test_every_example_is_linked_from_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    examples = [e for e in (DOCS / "examples").iterdir() if e.suffix in (".py", ".ipynb")]
    assert len(examples) >= 5
    assert [e.name for e in examples if f"](examples/{e.name})" not in index] == []
