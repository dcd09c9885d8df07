"""Checks registers, spills, loads and instructions of the kernels' machine code without a GPU."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guardtest.versions import has_triton

TARGETS = ["80", "90", "100", "89", "120", "gfx90a", "gfx942"]
SUPPORT = Path(__file__).parents[1] / "support"
MAX_REGISTERS = 80  # three programs of 256 threads per multiprocessor
MAX_ROCM_REGISTERS = 128  # four waves per SIMD; a program of 256 threads is one
MAX_ANY_POWER_REGISTERS = 128  # limited by logarithms: two programs per multiprocessor suffice
MAX_UNIT_REGISTERS = 128  # four programs of 128 threads per multiprocessor
MAX_LONE_REGISTERS = 255  # kernels with a single program
# Spill instructions once per step, because sm_80 has at most 128 registers here.
MAX_LONE_SPILLS = 16
# (kernel, target, triton): spill instructions outside the main loop, once per chunk.
KNOWN_SPILLS = {("measure bf16 p=2", 100, "3.6.0"): 5, ("measure fp64 p=2", 100, "3.8.0"): 5}
# For measure with triton 3.4, whose ptxas has no register left for the prefetch of a chunk row in
# float64 and with logarithms.
MAX_SPILLS_OF_3_4 = 14
# Instructions of the main loop per 16 bytes read; the budget of sm_90 is about 99.
MAX_INSTRUCTIONS = {
    "measure fp16": 40,
    "measure bf16": 48,
    "measure fp32": 24,
    "measure fp64": 18,
    # GPUs with slow fp64 read 2 to 7 bytes per clock and SM; this is a third of their budget.
    "measure fp16 group": 80,
    "measure bf16 group": 88,
    "measure fp32 group": 64,
    "apply fp16": 36,
    "apply bf16": 36,
    "apply fp32": 16,
    "apply fp64": 14,
    "bits 16 checksum": 26,
    "bits 16 nonzero checksum": 76,
    "bits 32 nonzero": 22,
    "bits 32 checksum": 11,
    "bits 32 nonzero checksum": 24,
    "bits 64 nonzero checksum": 20,
}
MAX_UPDATE_INSTRUCTIONS = {  # per element; torch's own fused AdamW takes 60 (fp32), 65 (bf16)
    "adamw fp32": 32,
    "adamw fp32 reproducible": 58,
    "adamw bf16": 34,
    "adamw bf16 stochastic": 64,
    "adamw bf16 reproducible": 60,
    "adamw fp32 of bf16 gradients": 34,
    "adamw master": 34,
    "adamw remainder": 40,
    "adamw bf16 remainder": 64,
    "adamw amsgrad": 38,
    "adamw fp32 spikes": 42,
    "adamw fp64": 90,
    "adam fp16": 38,
    "adamw fp16 stochastic": 62,
    "sgd nesterov fp32": 20,
    "lion bf16": 26,
    "adamw fp32 statistics": 54,
    "adamw bf16 stochastic statistics": 88,
    "adamw remainder statistics": 64,
}


@functools.cache
def reports(target: str) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(SUPPORT)
    run = subprocess.run(
        [sys.executable, "-m", "guardtest.machine_code", target],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def table(rows: list[dict]) -> str:
    columns = ["kernel", "target", "registers", "spills", "loads", "stores", "instructions"]
    lines = [columns, *([str(r.get(c, "")) for c in columns] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    )


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target, capsys):
    if target.startswith("gfx") and not has_triton(3, 5):
        pytest.skip("triton 3.4 links AMD code with the linker of an installed ROCm")
    rows = reports(target)
    with capsys.disabled():
        print(f"\ntriton {rows[0]['triton']}\n{table(rows)}")
    for row in rows:
        name = row["kernel"]
        any_power = "p=3" in name or "p=8" in name
        ceiling = MAX_ROCM_REGISTERS if target.startswith("gfx") else MAX_REGISTERS
        words = name.replace(",", "").split()
        spills = KNOWN_SPILLS.get((" ".join(words[:3]), row["target"], row["triton"]), 0)
        if name.startswith("measure") and not has_triton(3, 5):
            spills = MAX_SPILLS_OF_3_4
            assert not row["loop_spills"], row
        if name.startswith(("decide", "record")):
            ceiling, spills = MAX_LONE_REGISTERS, MAX_LONE_SPILLS
        elif name.startswith("advance adamw"):
            spills = MAX_LONE_SPILLS  # for the cosine of an angle beyond 2^20, once per tensor
        elif name.startswith(("unit", "scale")) or name.endswith(("units", "statistics")):
            ceiling = MAX_UNIT_REGISTERS
        elif any_power:
            ceiling = MAX_ANY_POWER_REGISTERS
        assert row["spills"] <= spills, row
        assert row["registers"] <= ceiling, row
        if name.startswith(("unit", "scale")) and not target.startswith("gfx"):
            _check_units(row)
        if name.startswith("update") and name.endswith("units"):
            assert row["spills"] == row.get("loop_spills", 0) == 0, row
        elif name.startswith("update"):
            _check_update(row, name.removeprefix("update "))
        if name.startswith("ratio") and "per_element" in row:
            assert row["loads"] == 2 and row["narrow_loads"] == row["loop_spills"] == 0, row
            assert row["per_element"] <= (40 if "fp32" in name else 90), row
        if not name.startswith(("measure", "apply", "bits")):
            continue
        # The number of 128-bit loads in flight. One is enough if logarithms are the limit. An AMD
        # multiprocessor holds more threads, so the compiler may keep fewer in flight.
        fewest = 2 if name.startswith("bits") and target.startswith("gfx") else 4
        assert row["loads"] >= (1 if any_power else fewest), row
        if name.startswith("apply"):
            assert row["stores"] >= 4, row
        if not target.startswith("gfx") and not any_power:
            assert row["narrow_loads"] == row["narrow_stores"] == row["loop_spills"] == 0, row
            kind = " ".join(words[:2] + ["group"] * ("group" in words))
            kind = name if name.startswith("bits") else kind
            assert row["instructions"] <= MAX_INSTRUCTIONS[kind], row


def _check_units(row: dict) -> None:
    """Checks that aligned rows are loaded as whole vectors; the inf-norm has one narrow loop."""
    if "p=inf" in row["kernel"]:
        return
    assert row["loads"] >= (1 if "p=3" in row["kernel"] else 2), row
    assert row["narrow_loads"] == row["narrow_stores"] == row["loop_spills"] == 0, row
    if "p=2" in row["kernel"]:
        assert row["instructions"] <= 48, row  # an fp16 element costs two float64 additions
    if row["kernel"].startswith("scale"):
        assert row["stores"] == row["loads"], row


def _check_update(row: dict, case: str) -> None:
    """Checks that the widest dtype uses 128-bit loads, and narrower ones as many elements."""
    assert row["spills"] == 0 and row["loads"] >= 2 and row["stores"] >= 2, row
    if "per_element" in row:  # not ROCm
        narrow = {"adamw fp32 of bf16 gradients": (1, 0), "adamw master": (1, 1)}
        narrow |= {"adamw remainder": (3, 2), "adamw fp16 stochastic": (2, 1)}
        narrow |= {"adamw remainder statistics": (3, 2)}
        assert (row["narrow_loads"], row["narrow_stores"]) == narrow.get(case, (0, 0)), row
        assert row["loop_spills"] == 0, row
        assert row["per_element"] <= MAX_UPDATE_INSTRUCTIONS[case], row
