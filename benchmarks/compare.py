"""Compares two results to find regressions: `python benchmarks/compare.py OLD.json NEW.json`.

The compared ratios refer to a peer that was measured in the same rounds, so the load of the two
runs may differ. A row of fastguard is flagged if its new spread (p20..p80) is entirely below the
old spread and its median fell by more than the tolerance, or if the error of its norm grew beyond
1e-7.

Exit status: 0 if no row is flagged, 1 if a row is flagged, 2 for a usage error.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastguard.commands.bench.machine import title_of
from fastguard.commands.bench.results import Result, load
from fastguard.commands.bench.runner import OURS

TOLERANCE = 0.05  # medians of two runs on an idle machine differ by up to 3 %
NORM_ERROR = 1e-7


@dataclass(frozen=True)
class Change:
    """A row that is in both results.

    Attributes:
        case, contender: The row.
        old, new: The ratios, with keys p20, p50 and p80.
        verdict: `"SLOWER"` and `"NORM"` are flagged; `"faster"` and `""` are not.
    """

    case: str
    contender: str
    old: dict[str, float]
    new: dict[str, float]
    verdict: str

    @property
    def flagged(self) -> bool:
        """Whether the change is a regression."""
        return self.verdict.isupper()

    @property
    def percent(self) -> float:
        """The change of the median ratio in percent."""
        return 100.0 * (self.new["p50"] / self.old["p50"] - 1.0)


def compare(old: Result, new: Result, tolerance: float = TOLERANCE) -> list[Change]:
    """Returns the changes of fastguard's rows in both results, in the order of the new result."""
    before = {(r["case"], r["series"], r["contender"]): r for r in old["rows"]}
    changes = []
    for row in new["rows"]:
        other = before.get((row["case"], row["series"], row["contender"]))
        compared = row["contender"].startswith(OURS) and row["contender"] != row["baseline"]
        if other is None or not compared or other["baseline"] != row["baseline"]:
            continue
        verdict = _verdict(other, row, tolerance)
        changes.append(Change(row["case"], row["contender"], other["ratio"], row["ratio"], verdict))
    return changes


def _verdict(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> str:
    if new["norm_error"] is not None:
        limit = max(NORM_ERROR, 0.0 if old["norm_error"] is None else float(old["norm_error"]))
        if not float(new["norm_error"]) <= limit:
            return "NORM"
    a, b = old["ratio"], new["ratio"]
    if b["p80"] < a["p20"] and b["p50"] < a["p50"] * (1.0 - tolerance):
        return "SLOWER"
    if b["p20"] > a["p80"] and b["p50"] > a["p50"] * (1.0 + tolerance):
        return "faster"
    return ""


def missing(old: Result, new: Result) -> list[str]:
    """Returns the rows of the old result that the new result lacks."""
    there = {(r["case"], r["series"], r["contender"]) for r in new["rows"]}
    return [
        f"{r['case']}: {r['contender']}"
        for r in old["rows"]
        if (r["case"], r["series"], r["contender"]) not in there
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="smallest relative change of a median that is flagged (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        old, new = load(args.old), load(args.new)
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    for name, result in (("old", old), ("new", new)):
        print(f"{name}: {title_of(result['machine'])}, {result['date']}, commit {result['commit']}")
    if title_of(old["machine"]) != title_of(new["machine"]):
        print("Warning: the machines differ, and ratios depend on the machine.")
    changes = compare(old, new, args.tolerance)
    if not changes:
        print("compare.py: the two results have no row in common", file=sys.stderr)
        return 2
    _print(changes)
    if gone := missing(old, new):
        print(f"\n{len(gone)} rows of the old result are not in the new one, first: {gone[0]}")
    flagged = [c for c in changes if c.flagged]
    print(f"\n{len(changes)} rows compared, {len(flagged)} flagged")
    return 1 if flagged else 0


def _print(changes: list[Change]) -> None:
    width = max(len(f"{c.case}, {c.contender}") for c in changes)
    print(f"\n{'':{width}}  {'old':>19}  {'new':>19}  change")
    for c in changes:
        print(
            f"{f'{c.case}, {c.contender}':{width}}  {_spread(c.old):>19}  {_spread(c.new):>19}  "
            f"{c.percent:+5.1f} %  {c.verdict}".rstrip()
        )


def _spread(r: dict[str, float]) -> str:
    return f"{r['p50']:.2f} [{r['p20']:.2f}..{r['p80']:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
