"""Finds out which optimizers of other libraries `compile_step=True` supports.

    PYTHONPATH=tests/support .venv-integrations/bin/python -m guardtest.compiled_survey

prints docs/compiled-optimizers.md. Each optimizer trains a small model with NaN in the first step,
in a later step and in two consecutive steps. The result is compared with a guard without
`compile_step`. This takes a few seconds per optimizer.
"""

from __future__ import annotations

import logging
import os
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from guardtest.third_party import LEFT_OUT, PACKAGES, Run, driven, maker_of, same

PAGE = Path(__file__).parents[3] / "docs" / "compiled-optimizers.md"
STORY = "NggNNgg"  # N: a step with NaN, g: a good step
TOLERANCE = 0.02
"""The largest difference of the weights, relative to their change. Newton-Schulz iterations in
bfloat16 amplify one rounding of the float32 learning rate to 1 %; all others stay below 1e-3."""

REASONS = {
    "the step reads a value from the device in Python": "reads a value in Python",
    "the step uses a tensor that is not a direct entry": "keeps tensors outside of `state`",
    "which would change even if the device skipped": "keeps values in Python",
    "whose param_groups belong to other": "wraps another optimizer",
}
OTHER_REASON = "cannot be traced"
REFUSAL = re.compile(r"compile_step=True does not support \w+: (.*); nothing was changed;", re.S)
LINE = re.compile(
    r"([^/\s]+\.py:\d+), in \w+: (.*) \((?:the step \w+|\w+:) .*\)$", re.S
)  # file, code


class Finding(NamedTuple):
    """The result for an optimizer.

    Attributes:
        supported: Whether `compile_step=True` supports it.
        line: The line that cannot be traced, with its file; empty if there is none.
        why: The reason for which it is refused.
    """

    supported: bool
    line: str = ""
    why: str = ""

    def row(self, name: str) -> str:
        return f"| {name} | {f'`{self.line}`' if self.line else ''} | {self.why} |"


@contextmanager
def quick() -> Iterator[None]:
    """Disables inductor, which takes seconds per optimizer and does not affect tracing."""
    from fastguard.guard import compiled_step

    before, compiled_step.BACKEND = compiled_step.BACKEND, "eager"
    try:
        yield
    finally:
        compiled_step.BACKEND = before
        torch._dynamo.reset()


def finding_of(name: str) -> Finding:
    """Tests an optimizer. Fails if it is neither supported nor refused cleanly."""
    with torch.compiler.set_stance("force_eager"):  # some optimizers compile their own update
        how = maker_of(name)
        plain = Run(name, True, how, max_norm=1.0)
        start = plain.weights()
        for i, kind in enumerate(STORY):
            plain.step(i, bad=kind == "N")
    with quick():
        try:
            run = Run(name, True, how, max_norm=1.0, compile_step=True)
        except TypeError as error:
            return _refused(str(error))
        for i, kind in enumerate(STORY):
            weights, state = run.weights(), run.state()
            try:
                run.step(i, bad=kind == "N")
            except TypeError as error:
                assert same(weights, run.weights()), f"{name}: weights changed before: {error}"
                assert run.state() == state, f"{name}: state changed before: {error}"
                return _refused(str(error))
            if kind == "N":
                assert same(weights, run.weights()), f"{name}: a skip changed weights"
                # In the first step, Python counters become tensors.
                assert i == 0 or run.state() == state, f"{name}: a skip changed state"
    assert run.opt.sync_free, f"{name}: was not compiled"
    for ours, theirs, first in zip(run.weights(), plain.weights(), start, strict=True):
        moved = (theirs - first).abs().max()
        off = (ours - theirs).abs().max()
        assert off <= TOLERANCE * moved, f"{name}: weights differ by {off}, moved by {moved}"
    return Finding(True)


def _refused(message: str) -> Finding:
    found = REFUSAL.search(message)
    if found is None:  # at construction
        assert "compile_step=True does not support" in message, message
    why = next((text for part, text in REASONS.items() if part in message), OTHER_REASON)
    line = LINE.search(found[1]) if found else None
    quoted = ": ".join(line.groups()) if line else ""
    return Finding(False, quoted.replace("|", "\\|"), why)


def distribution(name: str) -> str:
    """Returns the package of an optimizer, such as timm for timm.optim.Lion."""
    return name.split(".")[0]


def findings_on(page: str) -> dict[str, Finding]:
    """Returns the results on the page, by package and name."""
    found: dict[str, Finding] = {}
    modules = {distribution(name): name for name in PACKAGES}
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        module = modules.get(section.split()[0])
        if module is None:
            continue
        supported = re.search(r"^Supported \(\d+\): (.*?)\.$", section, re.M | re.S)
        for name in re.split(r",\s+", supported[1]) if supported else []:
            found[f"{module}.{name}"] = Finding(True)
        for name, line, why in re.findall(r"^\| (\w+) \| (.*) \| (.*?) \|$", section, re.M):
            if name != "refused":
                found[f"{module}.{name}"] = Finding(False, line.strip().strip("`"), why)
    return found


def page_of(findings: dict[str, Finding]) -> str:
    """Returns the whole page. The text above the first section is kept."""
    parts = [re.split(r"^## ", PAGE.read_text(), flags=re.M)[0].rstrip() + "\n"]
    for module in PACKAGES:
        own = {n.removeprefix(f"{module}."): f for n, f in findings.items() if n.startswith(module)}
        name = distribution(module)
        parts.append(f"## {name} {version(name).split('+')[0]}\n")
        good = [n for n, f in own.items() if f.supported]
        if good:
            parts.append(textwrap.fill(f"Supported ({len(good)}): {', '.join(good)}.", 120) + "\n")
        bad = [f.row(n) for n, f in own.items() if not f.supported]
        if bad:
            parts.append("\n".join(["| refused | line | reason |", "|---|---|---|", *bad]) + "\n")
    parts.append("## Not tried\n")
    parts.append("| optimizer | reason |\n|---|---|")
    parts[-1] += "".join(f"\n| {name} | {why} |" for name, why in sorted(LEFT_OUT.items())) + "\n"
    return "\n".join(parts)


def main() -> None:
    """Prints the page."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from guardtest.torchvision_ops import define_missing_operators

    define_missing_operators()
    torch.set_num_threads(1)
    names = driven()
    print(page_of(dict(zip(names, map(finding_of, names), strict=True))), end="")


if __name__ == "__main__":
    main()
