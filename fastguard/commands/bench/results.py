"""A benchmark result as JSON, with its origin; the input of tables, charts and comparisons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastguard.commands.bench.machine import Ceilings, commit, describe_machine, versions
from fastguard.commands.bench.runner import Row
from fastguard.commands.files import atomic_write
from fastguard.records.strict_json import dumps

SCHEMA = 1
Result = dict[str, Any]

# key -> type
KEYS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "command": str,  # the command that reproduces this file
    "date": str,  # ISO 8601, UTC
    "seconds": (int, float),  # duration of the run
    "commit": (str, type(None)),
    "machine": dict,  # see machine.describe_machine
    "versions": dict,
    "ceilings": dict,  # see machine.Ceilings
    "rows": list,  # see runner.Row
    "fits": list,  # growth curves: contender, series, slope, unit
    "memory": list,  # contender, grad_bytes, working_bytes
    "accuracy": list,  # case, dtype, magnitude, contender, norm_error
    "syncs": (int, type(None)),  # host waits in one guarded step on a GPU
    "left_out": dict,  # "case: contender" -> why
    "targets": list,  # project goals, filled by `python -m benchmarks`
}
SPREADS = ("ms", "host_ms", "device_ms", "ratio")


def new_result(command: str, device: torch.device, limit: Ceilings, rows: Sequence[Row]) -> Result:
    """Creates a result with these rows; the other lists are empty, for callers to fill."""
    return {
        "schema": SCHEMA,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "seconds": 0.0,
        "commit": commit(),
        "machine": describe_machine(device),
        "versions": versions(),
        "ceilings": vars(limit) | {},
        "rows": [row.as_dict() for row in rows],
        "fits": [],
        "memory": [],
        "accuracy": [],
        "syncs": None,
        "left_out": {},
        "targets": [],
    }


def save(result: Result, path: Path) -> None:
    """Writes a result atomically."""
    check(result)
    write(result, path)


def write(document: dict[str, Any], path: Path) -> None:
    """Writes a measurement of any schema atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(dumps(rounded(document), indent=1) + "\n")


def load(path: Path) -> Result:
    """Reads a result. An infinite norm error reads as the string "Infinity".

    Raises:
        ValueError: The file is not a result; the message says why.
    """
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); was it written by fastguard?") from None
    try:
        check(result)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return result


def check(result: object) -> None:
    """Checks that an object is a result of this schema.

    Raises:
        ValueError: A key is missing or wrong; the message names it.
    """
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"not a benchmark result of schema {SCHEMA}; run the benchmark again")
    for key, kind in KEYS.items():
        if key not in result:
            raise ValueError(f"the key {key!r} is missing; run the benchmark again")
        if not isinstance(result[key], kind):
            raise ValueError(
                f"the key {key!r} has the wrong type {type(result[key]).__name__}; run the "
                "benchmark again"
            )
    for row in result["rows"]:
        if missing := set(Row.__annotations__) - set(row):
            raise ValueError(f"a row of {row.get('case')!r} lacks {', '.join(sorted(missing))}")
        for name in SPREADS:
            if set(row[name]) != {"p20", "p50", "p80"}:
                raise ValueError(
                    f"{name} of {row['case']!r} must hold p20, p50 and p80; run the benchmark again"
                )


def find(result: Result, case: str, contender: str) -> dict[str, Any] | None:
    """The row of one contender in one case."""
    for row in result["rows"]:
        if row["case"] == case and row["contender"] == contender:
            return row
    return None


def rounded(value: Any) -> Any:
    """Rounds floats to five digits; further digits are noise and lengthen diffs."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return value
