"""All cases of the suite.

Models are parameter lists of real models (benchmarks/shapes); extremes are hard for a guard: many
tiny tensors, one huge tensor, thousands of adapters.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.targets import MODELS, WHOLE_STEPS
from fastguard.commands.bench.contenders import PEERS_ON_CUDA
from fastguard.commands.bench.selection import FUNCTIONS, USUAL_STEP
from fastguard.commands.bench.steps import FLAT_PARAMETERS, STEPS, TRUSTED_PARAMETERS
from fastguard.commands.bench.workload import Case, Shape, Situation

SHAPES = Path(__file__).parent / "shapes"
CPU_SECONDS, CUDA_SECONDS = 2.0, 1.0  # duration per case
LARGE = 2**30  # elements; larger cases have two contenders, since a call takes seconds on a CPU

CLIPS: tuple[Situation, ...] = ("nothing to clip", "clipping")
STEP_SITUATIONS: tuple[Situation, ...] = (*CLIPS, "one NaN, skipped")
EVERYONE = (*FUNCTIONS[:1], "torch for-loop", *FUNCTIONS[1:])
COMPILED = ("torch foreach", "torch compiled", "fastguard", "fastguard compiled")
LARGE_FIELD = ("torch foreach", "fastguard")

STEP_FIELD = (
    "bare step",
    "clip + step",
    "GuardedOptimizer",
    "GuardedOptimizer flat",
    FLAT_PARAMETERS,
    TRUSTED_PARAMETERS,
)

EXTREMES: dict[str, list[Shape]] = {
    "5000 x 100": [(100,)] * 5000,
    "1000 x 10k": [(10_000,)] * 1000,
    "2000 x 1k": [(1000,)] * 2000,
    "10 x 10M": [(10_000_000,)] * 10,
    "20k LoRA": [(8, 128), (128, 8)] * 10_000,
}
ONE_GB: dict[str, list[Shape]] = {"1 x 256M": [(2**28,)]}
# The lists of NeMo Automodel's pull request 3685. It does not give the shapes of the first list,
# but only the number of tensors, 500, and the number of elements, 859 * 2**18.
MIXED_MATRICES: list[Shape] = [(1024, 512)] * 359 + [(512, 512)] * 141
ONE_3_GB: list[Shape] = [(6_000_261, 256)]


def model_shapes(name: str) -> list[Shape]:
    """Returns the shapes of the parameters of a model, in its order."""
    listed = json.loads((SHAPES / f"{name}.json").read_text())["parameters"]
    return [tuple(shape) for _, shape in listed]


def cases(device: torch.device) -> list[Case]:
    """Returns all cases: functions first, then whole steps."""
    return [*function_cases(device), *step_cases(device)]


def function_cases(device: torch.device) -> list[Case]:
    """Returns the cases of clipping: models, extremes, dtypes, a NaN, cold caches, compiled."""
    cuda = device.type == "cuda"
    everyone = (*EVERYONE, *PEERS_ON_CUDA) if cuda else EVERYONE

    def both(name: str, shapes: list[Shape], dtype: str = "fp32", **more) -> list[Case]:
        few = sum(torch.Size(s).numel() for s in shapes) >= LARGE and not cuda
        field = LARGE_FIELD if few else everyone
        return [Case(name, shapes, field, dtype=dtype, situation=s, **more) for s in CLIPS]

    listed: list[Case] = []
    for name in MODELS:
        listed += both(name, model_shapes(name))
    for name in ("gpt2-124m", "llama-3.2-1b"):
        listed += both(name, model_shapes(name), "bf16")
    listed += both("gpt2-124m", model_shapes("gpt2-124m"), "fp16")
    listed += both("gpt2-124m", model_shapes("gpt2-124m"), "mixed")
    if cuda:
        listed += both("llama-3-8b", model_shapes("llama-3-8b"), "bf16")
    for name, shapes in (EXTREMES | ONE_GB if cuda else EXTREMES).items():
        listed += both(name, shapes)
    listed += both("500 matrices", MIXED_MATRICES, "mixed matrices")
    if cuda:
        listed += both("1 x 256M", ONE_GB["1 x 256M"], "bf16")
        listed += both("1 x 1536M", ONE_3_GB, "bf16")
    else:
        listed += both("5000 x 100", EXTREMES["5000 x 100"], cold=True)
    for name, shapes in (
        ("gpt2-124m", model_shapes("gpt2-124m")),
        ("5000 x 100", EXTREMES["5000 x 100"]),
    ):
        listed.append(Case(name, shapes, everyone, situation="one NaN, zeroed"))
    return [*listed, *compiled_cases()]


def compiled_cases() -> list[Case]:
    """Returns cases that compare eager and compiled code.

    With 148 tensors, compiling takes minutes on a CPU.
    """
    shapes: list[Shape] = [(1_000_000,)] * 10
    return [Case("10 x 1M", shapes, COMPILED, situation=s) for s in CLIPS]


def step_cases(device: torch.device) -> list[Case]:
    """Returns the cases of whole optimizer steps."""
    variants = [(kind, variant) for kind in ("AdamW", "SGD") for variant in ("fused", "foreach")]
    listed = [
        Case(
            "convnext-t",
            model_shapes("convnext-t"),
            tuple(STEPS),
            USUAL_STEP,
            situation=situation,
            optimizer=optimizer,
        )
        for optimizer in variants
        for situation in STEP_SITUATIONS
    ]
    gpt2 = model_shapes("gpt2-124m")
    fused = ("AdamW", "fused")
    for name in WHOLE_STEPS:
        if name == "gpt2-124m":  # this model follows below, with all contenders
            continue
        shapes = EXTREMES[name] if name in EXTREMES else model_shapes(name)
        listed.append(Case(name, shapes, STEP_FIELD, "clip + step", optimizer=fused))
    situations = STEP_SITUATIONS if device.type == "cuda" else CLIPS
    listed += [
        Case("gpt2-124m", gpt2, tuple(STEPS), USUAL_STEP, situation=s, optimizer=fused)
        for s in situations
    ]
    return listed
