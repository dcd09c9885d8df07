"""A hook of MkDocs that adds pages and pictures from outside docs/ to the site.

In the repository, a page of docs/ links to `../CHANGELOG.md`. In the site, this file is
`changelog.md`, so the hook rewrites the link. Links to other files outside docs/ are not rewritten,
and the strict build fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "measuring.md",
}
PLACES = {
    **PAGES,
    **{
        path.relative_to(ROOT).as_posix(): f"results/{path.name}"
        for path in sorted((ROOT / "benchmarks/results").iterdir())
        if path.suffix in (".png", ".json")
    },
    "README.md": "index.md",
}
"""The path in the site of each file of the repository."""

LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for source, place in PLACES.items():
        if source != "README.md":
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    outside = {place: source for source, place in PAGES.items()}
    source = outside.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def in_the_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        place = PLACES.get(target, target.removeprefix("docs/"))
        if target not in PLACES and not target.startswith("docs/"):
            return link[0]
        anchor = "" if target == "README.md" else link[2] or ""
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(place, here)}{anchor})"

    return LINK.sub(in_the_site, markdown)
