"""The performance targets of the project, compared with a result.

Targets for other machines, and targets whose case was not run, are printed as not measured. The
measured values of missed targets are printed too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from benchmarks.contenders import READ_PASS
from fastguard.commands.bench.results import Result, find
from fastguard.commands.bench.steps import FLAT_PARAMETERS, TRUSTED_PARAMETERS
from fastguard.commands.bench.table import rich_parts

MODELS = ("convnext-t", "gpt2-124m", "llama-3.2-1b", "resnet50", "vit-b16", "yolo11n")
NOT_MEASURED = "not measured on this machine"
TARGET_MACHINES = {"cpu": "two CPU cores", "cuda": "an H200-class card"}
VERDICTS = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}
Found = tuple[float, str] | None  # the value, and the text to print


@dataclass(frozen=True)
class Target:
    """A target.

    Attributes:
        device: `"cpu"` (two cores) or `"cuda"` (an H200-class card).
        what: Description of the case.
        bound: The lower bound, or the upper bound if `at_most`.
        unit: Unit printed after the number.
        look_up: Finds the measured value in a result.
        at_most: Whether the value must not exceed the bound. Default: False.
    """

    device: str
    what: str
    bound: float
    unit: str
    look_up: Callable[[Result], Found]
    at_most: bool = False

    def judge(self, result: Result) -> dict[str, str | bool | None]:
        """Compares the target with a result."""
        found = self.look_up(result) if result["machine"]["device"] == self.device else None
        sign = "<=" if self.at_most else ">="
        met = None
        if found is not None:
            met = found[0] <= self.bound if self.at_most else found[0] >= self.bound
        return {
            "device": self.device,
            "what": self.what,
            "target": f"{sign} {self.bound:g}{self.unit}",
            "measured": NOT_MEASURED if found is None else found[1],
            "met": met,
        }


def judge(result: Result) -> list[dict[str, str | bool | None]]:
    """Compares all targets with a result."""
    return [target.judge(result) for target in TARGETS]


def target_table(result: Result, *, unmeasured: bool = True) -> Any:
    """Returns a table of targets and measured values.

    Args:
        result: A result.
        unmeasured: Include targets of other machines and of cases that were not run. Default: True.
    """
    box, table = rich_parts()
    t = table.Table(title="Targets", box=box.SIMPLE_HEAD, title_justify="left")
    t.add_column("case", min_width=30)
    t.add_column("target", justify="right", no_wrap=True)
    t.add_column("measured", no_wrap=True)
    t.add_column("", no_wrap=True)
    targets = [t for t in result["targets"] if unmeasured or t["met"] is not None]
    for device, entries in groupby(targets, key=lambda entry: entry["device"]):
        t.add_section()
        t.add_row(f"[dim]{TARGET_MACHINES[device]}[/dim]")
        for entry in entries:
            t.add_row(
                entry["what"],
                entry["target"],
                entry["measured"].replace("[", r"\["),
                VERDICTS[entry["met"]],
            )
    return t


def _ratio(case: str, contender: str = "fastguard") -> Callable[[Result], Found]:
    def look_up(result: Result) -> Found:
        row = find(result, case, contender)
        if row is None:
            return None
        r = row["ratio"]
        return r["p50"], f"{r['p50']:.2f}x [{r['p20']:.2f}..{r['p80']:.2f}]"

    return look_up


def _whole_step(name: str, contender: str = FLAT_PARAMETERS) -> Callable[[Result], Found]:
    """Compares a contender's guarded AdamW with `clip_grad_norm_` plus fused AdamW."""

    def look_up(result: Result) -> Found:
        case = f"{name} fp32, AdamW fused, nothing to clip"
        row, base = find(result, case, contender), find(result, case, "clip + step")
        if row is None or base is None:
            return None
        ratio = base["ms"]["p50"] / row["ms"]["p50"]
        return ratio, f"{ratio:.2f}x ({row['ms']['p50']:.3g} ms)"

    return look_up


def _worst_model(result: Result) -> Found:
    rows = [
        row
        for row in result["rows"]
        if row["name"] in MODELS
        and (row["dtype"], row["contender"], row["series"], row["optimizer"])
        == ("fp32", "fastguard", None, None)
    ]
    if {row["name"] for row in rows} != set(MODELS):
        return None
    worst = min(rows, key=lambda row: row["ratio"]["p50"])
    p50 = worst["ratio"]["p50"]
    return p50, f"{p50:.2f}x ({worst['name']}, {worst['situation']})"


def _working_memory(result: Result) -> Found:
    ours = [m for m in result["memory"] if m["contender"].startswith("fastguard")]
    if not ours:
        return None
    most = max(ours, key=lambda m: m["working_bytes"])
    megabytes = most["working_bytes"] / 1e6
    return megabytes, f"{megabytes:.1f} MB ({most['contender']})"


def _worst_error(result: Result) -> Found:
    """Finds the largest error of all norms, including norms of the timed cases (magnitude 1)."""
    found: list[tuple[float, str]] = []
    for a in result["accuracy"]:
        if a["contender"].startswith("fastguard"):
            error = float("inf") if a["norm_error"] is None else a["norm_error"]
            found.append((error, f"{a['case']} {a['dtype']}, |x| = {a['magnitude']:g}"))
    if not found:
        return None
    for row in result["rows"]:
        if row["contender"].startswith("fastguard") and row["norm_error"] is not None:
            found.append((row["norm_error"], row["case"]))
    error, where = max(found)
    return error, f"{error:.1e} ({where})"


def _limit(case: str) -> Callable[[Result], Found]:
    """Finds the percentage of the limit that the read pass reaches, or else the whole call."""

    def look_up(result: Result) -> Found:
        alone, whole = find(result, case, READ_PASS), find(result, case, "fastguard")
        row, note = (alone, "") if alone else (whole, " (the whole call)")
        if row is None:
            return None
        return row["limit_percent"], f"{row['limit_percent']:.0f} %{note}"

    return look_up


def _host_us(case: str, contender: str) -> Callable[[Result], Found]:
    def look_up(result: Result) -> Found:
        row = find(result, case, contender)
        if row is None:
            return None
        us = row["host_ms"]["p50"] * 1e3
        return us, f"{us:.0f} µs"

    return look_up


def _host_ratio(case: str, contender: str) -> Callable[[Result], Found]:
    def look_up(result: Result) -> Found:
        row, base = find(result, case, contender), find(result, case, "torch foreach")
        if row is None or base is None:
            return None
        ratio = base["host_ms"]["p50"] / row["host_ms"]["p50"]
        return ratio, f"{ratio:.1f}x"

    return look_up


def _reads_above_bare(case: str) -> Callable[[Result], Found]:
    def look_up(result: Result) -> Found:
        guarded, bare = find(result, case, "GuardedOptimizer"), find(result, case, "bare step")
        if guarded is None or bare is None:
            return None
        one_read = bare["grad_bytes"] / result["ceilings"]["read_gb_s"] / 1e6
        reads = (guarded["device_ms"]["p50"] - bare["device_ms"]["p50"]) / one_read
        return reads, f"{reads:.2f} reads"

    return look_up


def _syncs(result: Result) -> Found:
    return None if result["syncs"] is None else (result["syncs"], str(result["syncs"]))


def _pair(
    name: str, unclipped: float, clipping: float, contender: str = "fastguard"
) -> list[Target]:
    label = name if contender == "fastguard" else f"{name}, {contender.removeprefix('fastguard ')}"
    return [
        Target(
            "cpu",
            f"{label}, nothing to clip",
            unclipped,
            "x",
            _ratio(f"{name}, nothing to clip", contender),
        ),
        Target("cpu", f"{label}, clipping", clipping, "x", _ratio(f"{name}, clipping", contender)),
    ]


ONE_GB = "1 x 256M"
WHOLE_STEPS = {
    "5000 x 100": 40.0,
    "1000 x 10k": 4.0,
    "yolo11n": 2.0,
    "resnet50": 1.7,
    "gpt2-124m": 1.4,
}
SMALL = "2000 x 1k fp32, nothing to clip"

TARGETS: tuple[Target, ...] = (
    *_pair("gpt2-124m fp32", 2.3, 0.95),
    *_pair("1000 x 10k fp32", 1.6, 0.95),
    *_pair("5000 x 100 fp32", 4.5, 1.5),
    *_pair("gpt2-124m bf16", 0.95, 0.65),
    *_pair("5000 x 100 fp32", 9, 6, "fastguard flat"),
    *_pair("5000 x 100 fp32", 60, 40, "fastguard flat trusted"),
    *_pair("1000 x 10k fp32", 4, 2.5, "fastguard flat"),
    *(
        Target("cpu", f"{name}, whole step, flat parameters", bound, "x", _whole_step(name))
        for name, bound in WHOLE_STEPS.items()
    ),
    *(
        Target(
            "cpu",
            f"{name}, whole step, flat parameters, trusted",
            bound,
            "x",
            _whole_step(name, TRUSTED_PARAMETERS),
        )
        for name, bound in WHOLE_STEPS.items()
    ),
    Target("cpu", "slowest fp32 model", 0.9, "x", _worst_model),
    Target("cpu", "working memory", 16, " MB", _working_memory, at_most=True),
    Target("cpu", "norm against float64", 1e-7, "", _worst_error, at_most=True),
    Target(
        "cuda",
        "read pass, 1 GB fp32",
        92,
        " % of the read limit",
        _limit(f"{ONE_GB} fp32, nothing to clip"),
    ),
    Target(
        "cuda",
        "read pass, 0.5 GB bf16",
        92,
        " % of the read limit",
        _limit(f"{ONE_GB} bf16, nothing to clip"),
    ),
    Target("cuda", "1 GB, nothing to clip", 2.8, "x", _ratio(f"{ONE_GB} fp32, nothing to clip")),
    Target("cuda", "1 GB, clipping", 1.1, "x", _ratio(f"{ONE_GB} fp32, clipping")),
    Target(
        "cuda",
        "llama-3.2-1b bf16, host + device",
        3,
        "x",
        _ratio("llama-3.2-1b bf16, nothing to clip"),
    ),
    Target("cuda", "2000 x 1k, host time", 300, " µs", _host_us(SMALL, "fastguard"), at_most=True),
    Target("cuda", "2000 x 1k, host time", 10, "x torch", _host_ratio(SMALL, "fastguard")),
    # 40 µs plus 0.1 µs for each of 2000 identity checks
    Target(
        "cuda",
        "2000 x 1k, flat, host time",
        240,
        " µs",
        _host_us(SMALL, "fastguard flat"),
        at_most=True,
    ),
    Target(
        "cuda",
        "2000 x 1k, flat trusted, host time",
        40,
        " µs",
        _host_us(SMALL, "fastguard flat trusted"),
        at_most=True,
    ),
    Target(
        "cuda",
        "AdamW(fused) + guard above the bare step",
        1,
        " reads",
        _reads_above_bare("gpt2-124m fp32, AdamW fused, nothing to clip"),
        at_most=True,
    ),
    Target("cuda", "host waits in a guarded step", 0, "", _syncs, at_most=True),
)
