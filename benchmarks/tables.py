"""Fills the tables of README.md and docs/benchmarks.md from the committed results.

python -m benchmarks.tables               # exit status 1 if a page is out of date
python -m benchmarks.tables --write       # renews the pages, after `make bench`

A page marks each table with `<!-- results: NAME -->` and `<!-- end of results -->`, where NAME is a
key of `TABLES`. The text around the tables repeats none of their numbers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.targets import WHOLE_STEPS
from fastguard.commands.bench.results import Result, find, load
from fastguard.commands.bench.steps import FLAT_PARAMETERS, TRUSTED_PARAMETERS

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/cpu-intel-xeon-processor-2-60ghz-2-cores.json"
PAGES = (ROOT / "README.md", ROOT / "docs/benchmarks.md")
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

GUARDED, FLAT, TRUSTED = "fastguard", "fastguard flat", "fastguard flat trusted"
STEP = "{} fp32, AdamW fused, {}"
BASE = "clip + step"
IDLE, CLIPS = "nothing to clip", "clipping"
MAIN_STEPS = ("5000 x 100", "resnet50", "gpt2-124m")
CLIPPING = {
    "gpt2-124m fp32": (GUARDED,),
    "gpt2-124m bf16": (GUARDED,),
    "resnet50 fp32": (GUARDED,),
    "yolo11n fp32": (GUARDED,),
    "5000 x 100 fp32": (GUARDED, FLAT, TRUSTED),
    "1000 x 10k fp32": (GUARDED, FLAT, TRUSTED),
    "1 MB fp32": (GUARDED,),
}
LABELS = {
    FLAT: "flat buckets",
    TRUSTED: "flat buckets, trusted",
    "1 MB fp32": "1 MB fp32, 8 tensors",
}


def filled(page: str, result: Result) -> str:
    """The page, with the figures of a result in its tables."""

    def fill(block: re.Match[str]) -> str:
        lines = TABLES[block[2]](result)
        return f"{block[1]}\n{chr(10).join(lines)}\n\n{block[3]}"

    return BLOCK.sub(fill, page)


def machine(result: Result) -> list[str]:
    m, versions = result["machine"], result["versions"]
    torch = versions["torch"].partition("+")[0]
    day = result["date"].partition("T")[0]
    return [f"{m['cpu']}, {m['cores']} cores ({m['capability']}), torch {torch}, {day}."]


def whole_steps(result: Result, names: Iterable[str] = WHOLE_STEPS) -> list[str]:
    """Clipping and AdamW: torch in milliseconds, and how many times faster the guard is."""
    columns = {
        "guarded": "GuardedOptimizer",
        "`flat_parameters=True`": FLAT_PARAMETERS,
        '`flat_parameters="trusted"`': TRUSTED_PARAMETERS,
    }
    first = STEP.format(next(iter(WHOLE_STEPS)), IDLE)
    columns = {label: c for label, c in columns.items() if find(result, first, c)}
    lines = _head("parameters", "`clip_grad_norm_` and step", *columns)
    for name in names:
        case = STEP.format(name, IDLE)
        base = _ms(result, case, BASE)
        ratios = [f"{base / _ms(result, case, c):.2f}x" for c in columns.values()]
        lines.append(_line(f"{name} fp32", f"{base:.3g} ms", *ratios))
    return lines


def clipping(result: Result) -> list[str]:
    """How many times faster than `torch.nn.utils.clip_grad_norm_`."""
    lines = _head("gradients", IDLE, CLIPS)
    for case, contenders in CLIPPING.items():
        for contender in contenders:
            rows = [find(result, f"{case}, {situation}", contender) for situation in (IDLE, CLIPS)]
            ratios = ["" if row is None else f"{row['ratio']['p50']:.2f}x" for row in rows]
            label = LABELS.get(case, case)
            label += "" if contender == GUARDED else f", {LABELS[contender]}"
            lines.append(_line(label, *ratios))
    return lines


def step_cost(result: Result) -> list[str]:
    """Milliseconds of one step of GPT-2 124M."""
    steps = {
        "bare step": "bare step",
        "`clip_grad_norm_`, then step": BASE,
        "guarded step": "GuardedOptimizer",
        "guarded step with `flat_buckets=True`": "GuardedOptimizer flat",
        "guarded step with `flat_parameters=True`": FLAT_PARAMETERS,
    }
    lines = _head("step", "nothing to clip, ms", "clipping, ms")
    for label, contender in steps.items():
        cells = [_ms(result, STEP.format("gpt2-124m", s), contender) for s in (IDLE, CLIPS)]
        lines.append(_line(label, *(f"{ms:.1f}" for ms in cells)))
    return lines


def targets(result: Result) -> list[str]:
    """Every target that was measured on this machine."""
    lines = _head("case", "target", "measured", "")
    for target in result["targets"]:
        if target["met"] is not None:
            verdict = "met" if target["met"] else "missed"
            lines.append(_line(target["what"], target["target"], target["measured"], verdict))
    return lines


TABLES: dict[str, Callable[[Result], list[str]]] = {
    "machine": machine,
    "whole-steps": whole_steps,
    "main-steps": lambda result: whole_steps(result, MAIN_STEPS),
    "clipping": clipping,
    "step-cost": step_cost,
    "targets": targets,
}


def _ms(result: Result, case: str, contender: str) -> float:
    row = find(result, case, contender)
    if row is None:
        raise LookupError(f"the result has no row of {contender!r} in the case {case!r}")
    return row["ms"]["p50"]


def _head(*cells: str) -> list[str]:
    return [_line(*cells), f"|{'---|' * len(cells)}"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="rewrite the tables of the pages")
    args = parser.parse_args()
    result, stale = load(RESULT), []
    for path in PAGES:
        before = path.read_text()
        after = filled(before, result)
        if after != before:
            stale.append(path.name)
            if args.write:
                path.write_text(after)
    if stale:
        print(f"{'written' if args.write else 'out of date'}: {', '.join(stale)}")
    return int(bool(stale) and not args.write)


if __name__ == "__main__":
    sys.exit(main())
