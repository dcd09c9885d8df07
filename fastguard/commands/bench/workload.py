"""Defines a case: the gradients, their state, the optimizer around them, and the bytes to move.

Byte models, in bytes of gradients g (parameters p, momenta m and v have the same size):

| situation | functions | inside AdamW | inside SGD with momentum |
|---|---|---|---|
| nothing to clip | read g | + read g, update p, m, v | + read g, update p, m |
| clipping | read g, update g | the same on top | the same on top |
| one NaN, zeroed | read g | | |
| one NaN, skipped | | read g | read g |

An update is one read and one write of the same memory. Nothing else has to move, so the minimum
time of a case is `read / read bandwidth + 2 * update / update bandwidth`, unless its data fits into
a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Shape = tuple[int, ...]
Situation = Literal["nothing to clip", "clipping", "one NaN, zeroed", "one NaN, skipped"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UPDATED = {"AdamW": 3, "SGD": 2}  # tensors as large as g that a step reads and writes
MIXED_FROM = 2**19  # elements
# number of random values, which are repeated; drawing 1e9 values takes longer than measuring
BLOCK = 2**22 - 3


@dataclass(frozen=True)
class Io:
    """Bytes that must move: read only, and updated in place (read once and written once)."""

    read: float
    update: float
    text: str

    def seconds(self, read_gb_s: float, update_gb_s: float) -> float:
        """The minimum time; `update_gb_s` counts bytes read and bytes written."""
        return self.read / (read_gb_s * 1e9) + 2 * self.update / (update_gb_s * 1e9)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: Name of the gradients: a model, or `"5000 x 100"`.
        shapes: One shape per parameter.
        contenders: Names from `contenders.CONTENDERS` and `steps.STEPS`.
        baseline: The contender with which all other contenders are compared.
        dtype: `"fp32"`, `"bf16"`, `"fp16"`; `"mixed"`: bf16 matrices and fp32 vectors;
            `"mixed matrices"`: bf16 from `MIXED_FROM` elements on, fp32 below.
        situation: State of the gradients.
        optimizer: `("AdamW" | "SGD", "fused" | "foreach")` for a whole step; None: a function.
        cold: Whether caches are emptied before every call. Always the case on a GPU.
        segments: Number of clip coefficients that the parameters are distributed over.
        series: Growth curve that this case belongs to: `"tensors"`, `"bytes"`, `"segments"`.
    """

    name: str
    shapes: Sequence[Shape]
    contenders: tuple[str, ...]
    baseline: str = "torch foreach"
    dtype: str = "fp32"
    situation: Situation = "nothing to clip"
    optimizer: tuple[str, str] | None = None
    cold: bool = False
    segments: int = 1
    series: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(self.shapes))  # a tuple is hashable

    @property
    def id(self) -> str:
        """A unique id for tables and for comparing results."""
        parts = [f"{self.name} {self.dtype}"]
        if self.optimizer:
            parts.append(" ".join(self.optimizer))
        parts.append(self.situation)
        if self.cold:
            parts.append("cold")
        if self.segments > 1:
            parts.append(f"{self.segments} segments")
        return ", ".join(parts)

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def grad_bytes(self) -> int:
        return sum(math.prod(s) * _dtype(self.dtype, s).itemsize for s in self.shapes)

    @property
    def changes_grads(self) -> bool:
        """Whether a measured call may change the gradients."""
        return self.situation != "nothing to clip"

    @property
    def io(self) -> Io:
        """The byte model."""
        g = self.grad_bytes
        clips = self.situation == "clipping"
        text = "read g, update g" if clips else "read g"
        if self.optimizer is None or self.situation == "one NaN, skipped":
            return Io(g, g if clips else 0, text)
        kind = self.optimizer[0]
        more = "read g, update p, m, v" if kind == "AdamW" else "read g, update p, m"
        return Io(2 * g, g * (UPDATED[kind] + clips), f"{text}; {more}")


class Workload:
    """Parameters with gradients as after a backward pass: one allocation per tensor.

    Parameters own memory only if an optimizer steps them; otherwise they are expanded scalars.

    Attributes:
        parameters: The parameters, with `.grad` set.
        true_norm: The L2 norm of the finite gradients in float64.
        max_norm: Twice the norm, or half of it when clipping.
        pristine: Copies of the gradients if a call changes them; else empty.
    """

    def __init__(self, case: Case, device: torch.device, *, magnitude: float = 1.0) -> None:
        self.case = case
        self.device = device
        generator = torch.Generator().manual_seed(0)
        block = (torch.randn(BLOCK, generator=generator) * magnitude).to(device)
        self.parameters: list[torch.nn.Parameter] = []
        at = 0
        for shape in case.shapes:
            dtype = _dtype(case.dtype, shape)
            owns_memory = case.optimizer is not None
            parameter = _parameter(shape, dtype, device, owns_memory=owns_memory)
            parameter.grad = torch.empty(shape, dtype=dtype, device=device)
            at = _tile(parameter.grad.view(-1), block, at)
            self.parameters.append(parameter)
        self.true_norm: float = float64_norm(self.grads)
        self.max_norm: float = self.true_norm * (0.5 if case.situation == "clipping" else 2.0)
        if case.situation.startswith("one NaN"):
            middle = self.grads[len(self.grads) // 2].view(-1)
            self.true_norm = math.sqrt(
                self.true_norm**2 - float(middle[middle.numel() // 2].double()) ** 2
            )
            middle[middle.numel() // 2] = math.nan
        self.pristine: list[Tensor] = [g.clone() for g in self.grads] if case.changes_grads else []

    @property
    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def segment_ids(self) -> list[int]:
        """The segment of each parameter; all segments have the same number of parameters."""
        n, count = len(self.parameters), self.case.segments
        return [i * count // n for i in range(n)]

    def twin(self) -> list[torch.nn.Parameter]:
        """A copy of parameters and gradients, for contenders that store gradients elsewhere."""
        twins = []
        for p in self.parameters:
            owns_memory = self.case.optimizer is not None
            twin = torch.nn.Parameter(p.detach().clone() if owns_memory else p.detach())
            assert p.grad is not None
            twin.grad = p.grad.clone()
            twins.append(twin)
        return twins

    def restore(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Restores the gradients in place."""
        if self.pristine:
            chosen = self.parameters if parameters is None else parameters
            torch._foreach_copy_([p.grad for p in chosen if p.grad is not None], self.pristine)


def bytes_needed(case: Case) -> int:
    """Memory in bytes that the workload of a case takes, including twins of flat contenders."""
    n_flat = sum("flat" in name for name in case.contenders)
    copies = 1 + n_flat
    if case.optimizer:  # each flat contender has parameters and a state of its own
        copies *= 1 + UPDATED[case.optimizer[0]]
    return case.grad_bytes * (copies + case.changes_grads)


def float64_norm(tensors: Sequence[Tensor]) -> float:
    """The L2 norm of all tensors together, in float64, a million elements at a time."""
    total = 0.0
    for tensor in tensors:
        for piece in tensor.view(-1).split(2**20):
            x = piece.double()
            total += float(torch.dot(x, x))
    return math.sqrt(total)


def _dtype(name: str, shape: Shape) -> torch.dtype:
    if name == "mixed matrices":
        return torch.bfloat16 if math.prod(shape) >= MIXED_FROM else torch.float32
    if name == "mixed":
        return torch.float32 if len(shape) < 2 else torch.bfloat16
    return DTYPES[name]


def _parameter(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, owns_memory: bool
) -> torch.nn.Parameter:
    if owns_memory:
        return torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
    return torch.nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape))


def _tile(flat: Tensor, block: Tensor, at: int) -> int:
    """Fills a vector by repeating a block from offset `at`; returns the final offset."""
    done = 0
    while done < flat.numel():
        n = min(flat.numel() - done, block.numel() - at)
        flat[done : done + n].copy_(block[at : at + n])
        done, at = done + n, (at + n) % block.numel()
    return at
