"""`benchmarks/compare.py`: flagged changes between two results, and the exit status."""

import copy
import subprocess
import sys
from pathlib import Path

from fastguard.commands.bench.results import find, save
from guardtest.bench import ROOT, a_case


def slowed(result, factor, case=None):
    other = copy.deepcopy(result)
    for row in other["rows"]:
        if case is None or row["case"] == case:
            row["ratio"] = {key: value * factor for key, value in row["ratio"].items()}
    return other


def steady(result):
    """The result with narrow spreads, as on an idle machine."""
    other = copy.deepcopy(result)
    for row in other["rows"]:
        p50 = row["ratio"]["p50"]
        row["ratio"] = {"p20": p50 * 0.99, "p50": p50, "p80": p50 * 1.01}
    return other


def test_compare_flags_a_slowdown_beyond_the_spread(benchmarks, result):
    compare = benchmarks("compare").compare
    old = steady(result)
    assert not any(c.flagged for c in compare(old, old))
    changes = compare(old, slowed(old, 0.7, a_case().id))
    flagged = {(c.case, c.contender) for c in changes if c.flagged}
    ours = {"fastguard", "fastguard flat", "fastguard flat trusted"}
    assert flagged == {(a_case().id, name) for name in ours}
    assert {c.verdict for c in compare(old, slowed(old, 1.5))} == {"faster"}
    assert not any(c.flagged for c in compare(old, slowed(old, 0.97)))  # within the tolerance


def test_compare_ignores_changes_within_the_spread(benchmarks, result):
    old = steady(result)
    for row in old["rows"]:
        row["ratio"] |= {"p20": row["ratio"]["p50"] * 0.5, "p80": row["ratio"]["p50"] * 2}
    assert not any(c.flagged for c in benchmarks("compare").compare(old, slowed(old, 0.7)))


def test_compare_flags_a_less_accurate_norm(benchmarks, result):
    worse = copy.deepcopy(result)
    row = find(worse, a_case().id, "fastguard")
    for bad in (1e-3, "Infinity"):
        row["norm_error"] = bad
        (flagged,) = [c for c in benchmarks("compare").compare(result, worse) if c.flagged]
        assert flagged.verdict == "NORM"


def test_the_exit_status_of_compare_shows_the_result(tmp_path, benchmarks, result, capsys):
    main = benchmarks("compare").main
    old, slow, broken = (str(tmp_path / f"{name}.json") for name in ("old", "slow", "broken"))
    save(steady(result), Path(old))
    save(slowed(steady(result), 0.5), Path(slow))
    Path(broken).write_text("{")
    assert main([old, old]) == 0
    assert main([old, slow]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main([old, broken]) == 2
    assert "broken.json" in capsys.readouterr().err


def test_compare_runs_as_a_script_from_any_folder(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks" / "compare.py",
        "no-such-file.json",
        "other.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "no-such-file.json" in done.stderr and "Traceback" not in done.stderr
