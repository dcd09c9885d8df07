"""The cases of `fastguard bench`, about a minute in total."""

from __future__ import annotations

import torch

from fastguard.commands.bench.contenders import PEERS_ON_CUDA
from fastguard.commands.bench.steps import STEPS
from fastguard.commands.bench.workload import Case, Shape

FUNCTIONS = (
    "torch foreach",
    "isfinite + clip",
    "GradScaler + clip",
    "fastguard",
    "fastguard flat",
    "fastguard flat trusted",
)
USUAL_STEP = "clip + isfinite(norm) + step"
SECONDS = 2.5  # duration per case


def gpt2_shapes(layers: int = 12, width: int = 768, vocabulary: int = 50257) -> list[Shape]:
    """The parameter shapes of GPT-2, in the order of its module tree."""
    block: list[Shape] = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (1024, width), *(layers * block), (width,), (width,)]


def selection(device: torch.device) -> list[Case]:
    """A model, many small tensors, and whole steps."""
    gpt2 = gpt2_shapes()
    functions = (*FUNCTIONS, *PEERS_ON_CUDA) if device.type == "cuda" else FUNCTIONS
    cases = [
        Case("gpt2-124m", gpt2, functions, situation="nothing to clip"),
        Case("gpt2-124m", gpt2, functions, situation="clipping"),
        Case("gpt2-124m", gpt2, functions, dtype="bf16", situation="nothing to clip"),
        Case("gpt2-124m", gpt2, functions, dtype="bf16", situation="clipping"),
    ]
    for name, shapes in (("1000 x 10k", [(10_000,)] * 1000), ("5000 x 100", [(100,)] * 5000)):
        cases += [
            Case(name, shapes, functions, situation="nothing to clip"),
            Case(name, shapes, functions, situation="clipping"),
        ]
    small_gpt = gpt2_shapes(layers=6, width=384)
    return [
        *cases,
        *(
            Case(
                "gpt2, 6 x 384", small_gpt, tuple(STEPS), USUAL_STEP,
                situation=situation, optimizer=("AdamW", "fused"),
            )
            for situation in ("nothing to clip", "clipping", "one NaN, skipped")
        ),
    ]  # fmt: skip
