"""Checks that every public symbol has a known type, and a docstring if it can have one.

`pyright --verifytypes` sees the package as the type checker of a user does: it counts every module,
class, function and attribute without a leading underscore. `--ignoreexternal` ignores types that
are imported from packages without annotations. The frameworks of `fastguard.integrations` are not
installed in .venv. `.ci/typings` declares the three classes of these frameworks that our classes
derive from, because the type of a class with an unknown base is unknown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "build/stage"  # the package laid out as it installs
PYTHON = Path(sys.executable).parent


def main() -> int:
    environment = {
        **os.environ,
        "PATH": f"{PYTHON}{os.pathsep}{os.environ['PATH']}",  # pyright asks this python for paths
        "PYTHONPATH": f"{STAGE}{os.pathsep}{ROOT / '.ci/typings'}",
    }
    command = [PYTHON / "pyright", "--verifytypes", "fastguard", "--ignoreexternal", "--outputjson"]
    result = subprocess.run(command, cwd=STAGE, env=environment, capture_output=True, text=True)
    if not result.stdout.startswith("{"):
        print(result.stdout, result.stderr, sep="", end="")
        return 1
    report = json.loads(result.stdout)["typeCompleteness"]
    missing = sorted(
        f"{place(found)}{symbol['name']}: {found['message']}"
        for symbol in report["symbols"]
        if symbol["isExported"]
        for found in symbol["diagnostics"]
    )
    causes = [
        line for line in missing if "is partially unknown" not in line or "Type argument" in line
    ]
    for line in causes or missing:  # the other lines follow from these causes
        print(line)
    counts = report["exportedSymbolCounts"]
    known = counts["withKnownType"]
    print(f"{known} of {sum(counts.values())} public symbols have a known type")
    return 1 if missing or known < sum(counts.values()) or not known else 0


def place(found: dict) -> str:
    """Returns `file:line: `, or "" for a symbol without a single place, such as a base class."""
    if not found.get("file"):
        return ""
    file = Path(found["file"])
    file = file.relative_to(STAGE) if file.is_relative_to(STAGE) else file
    if file.parts[:2] == ("fastguard", "kernels"):
        file = file.relative_to("fastguard")
    return f"{file}:{found['range']['start']['line'] + 1}: "


if __name__ == "__main__":
    sys.exit(main())
