"""`ActivationGuard`: counts, or removes, NaN and Inf in the outputs of modules.

Memory traffic: one read of every watched output, plus one write in `"clean"` mode. On a CPU a
finite output costs one read (`aminmax`). On other devices, the elements are compared and summed to
avoid a sync. This takes one read if `torch.compile` fuses the operations, and about five reads
otherwise. The counters are one int64 table on the device, `(modules, 3)`; memory use does not grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastguard.errors.checked_numbers import number_of
from fastguard.errors.plain_text import printable, shown
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.gradients.transfer import moved

Mode = Literal["count", "clean"]
MODES = ("count", "clean")

_unguarded = False


class ActivationCounts(NamedTuple):
    """Numbers of bad elements in a module's outputs since the last reset.

    Attributes:
        nan: NaN elements.
        inf: +Inf and -Inf elements.
        over_limit: Finite elements larger in magnitude than `limit`.
    """

    nan: int
    inf: int
    over_limit: int


class ActivationGuard:
    """Watches the outputs of modules with forward hooks; never synchronizes with the GPU.

    In `"clean"` mode, before the next module sees an output, NaN and Inf become 0 and everything
    else is clamped to ±limit. Elements are selected, never multiplied, in forward and backward, so
    a replaced element gets a gradient of 0. Values inside a module, and gradients that become
    non-finite in the backward pass, are not changed; use `GuardedOptimizer` for those.

    With `torch.compile`, create the guard first and then call the compiled model: the hooks are
    traced into the same graph. Compiled code may not see a guard that is created later (until
    `torch._dynamo.reset()`), but it notices when a guard is removed. A recomputed forward pass
    (activation checkpointing) counts twice.

    Args:
        model: The model whose modules are watched.
        mode: `"count"` leaves outputs unchanged; `"clean"` changes them.
        limit: Largest allowed magnitude of an activation, > 0; None: no limit.
        modules: One or several patterns, matched against the names in `model.named_modules()`:
            `"*"` for all, or `"decoder.*"`. `nn.Sequential` is skipped, since it computes nothing
            itself; the model itself has the name `""`.

    Raises:
        TypeError, ValueError: An argument is invalid, or no module matches.

    Example:
        >>> import torch, fastguard
        >>> class Log(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.log()
        >>> model = torch.nn.Sequential(Log(), torch.nn.ReLU())
        >>> with fastguard.ActivationGuard(model, mode="clean", limit=10.0) as guard:
        ...     print(model(torch.tensor([1.0, 0.0, -1.0])))
        tensor([0., 0., 0.])
        >>> guard.counts()["0"]
        ActivationCounts(nan=1, inf=1, over_limit=0)
    """

    _without_numbers = False  # whether the last output was on the meta device, or a placeholder

    def __init__(
        self,
        model: nn.Module,
        mode: Mode = "count",
        limit: float | None = None,
        modules: str | Sequence[str] = "*",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={shown(mode)} is unknown; use one of {', '.join(MODES)}")
        limit = None if limit is None else number_of("limit", limit, "use None or a number > 0")
        if limit is not None and not limit > 0:  # this form of the comparison also rejects NaN
            raise ValueError(f"limit={limit!r} must be None or a number > 0")
        watched = _matching(model, modules)
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        if device.type == "meta":
            device = torch.device("cpu")  # until the first output shows the device
        self.mode: Mode = mode
        self.limit: float = math.inf if limit is None else limit
        self._names = list(watched)
        self._table = torch.zeros(len(watched), 3, dtype=torch.int64, device=device)
        self._hooks = [
            module.register_forward_hook(_Watch(self, row))
            for row, module in enumerate(watched.values())
        ]

    def counts(self) -> dict[str, ActivationCounts]:
        """Returns the counts of each watched module, by name. Synchronizes with the GPU.

        Raises:
            ValueError: The last output was on the meta device, or a placeholder.
        """
        if self._without_numbers:
            raise ValueError(
                "the last output was on the meta device or under FakeTensorMode, so there are no "
                "values to count; allocate the model with model.to_empty(device=...) and load its "
                "weights, or call reset()"
            )
        rows = self._table.tolist()
        return {n: ActivationCounts(*row) for n, row in zip(self._names, rows, strict=True)}

    def reset(self) -> None:
        """Sets all counts to 0."""
        self._without_numbers = False
        self._table.zero_()

    def remove(self) -> None:
        """Removes the hooks and keeps the counts."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> ActivationGuard:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def __str__(self) -> str:
        """Returns one line per module with bad outputs. Synchronizes with the GPU."""
        bad = {name: counts for name, counts in self.counts().items() if any(counts)}
        if not bad:
            return f"no bad values in the outputs of {len(self._names)} modules"
        return "\n".join(
            f"{printable(name) or '(the model)'}: {c.nan} NaN, {c.inf} Inf, "
            f"{c.over_limit} over {self.limit:g}"
            for name, c in bad.items()
        )

    def _see(self, row: int, output: Any) -> Any:
        counted = [self._counted(t) for t in tree_leaves(output) if _is_watched(t)]
        found = [c for c in counted if c is not None]
        if not found:
            return self._all_cleaned(output) if self._without_numbers else None
        with torch.no_grad():
            if self._table.device.type == "cpu" and found[0].device.type != "cpu":
                self._table = self._table.to(found[0].device)  # the model was moved
            for counts in found:
                self._table[row] += moved(counts, self._table.device)
        return self._all_cleaned(output)

    def _all_cleaned(self, output: Any) -> Any:
        if self.mode == "count":
            return None
        return tree_map(lambda t: self._cleaned(t) if _is_watched(t) else t, output)

    def _counted(self, x: Tensor) -> Tensor | None:
        """Returns int64 `(3,)`; None if all counts are zero or cannot be determined."""
        unknown = x.is_meta or not (torch.compiler.is_compiling() or has_numbers(x))
        if unknown != self._without_numbers:
            self._without_numbers = unknown
        if unknown:
            return None
        x = _wide(x.detach())
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if not x.numel():
                return None
            low, high = (v.item() for v in x.aminmax())
            if -self.limit <= low and high <= self.limit and -math.inf < low and high < math.inf:
                return None  # no count is needed, since comparisons with NaN are false
        size, infinite = x.abs(), x.isinf()
        over = (size > self.limit) & ~infinite
        return torch.stack([x.isnan().sum(), infinite.sum(), over.sum()])

    def _cleaned(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, _wide(x)
        x = torch.where(x.isfinite(), x, torch.zeros((), dtype=x.dtype, device=x.device))
        return (x if self.limit == math.inf else x.clamp(-self.limit, self.limit)).to(dtype)


class _Watch:
    """The forward hook of one module."""

    def __init__(self, guard: ActivationGuard, row: int) -> None:
        self._guard = guard
        self._row = row

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if _unguarded else self._guard._see(self._row, output)


@contextmanager
def unguarded() -> Iterator[None]:
    """Disables all guards, so that replays see values that a guard would remove."""
    global _unguarded
    before, _unguarded = _unguarded, True
    try:
        yield
    finally:
        _unguarded = before


def _is_watched(x: Any) -> bool:
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.layout is torch.strided):
        return False
    return x.dtype is not torch.float4_e2m1fn_x2  # `float4_e2m1fn_x2` has no NaN and no Inf


def _wide(x: Tensor) -> Tensor:
    """Widens 8-bit floats, for which torch supports little more than exact conversions."""
    return x.float() if x.dtype.itemsize == 1 else x


def _matching(model: nn.Module, modules: str | Sequence[str]) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    patterns = [modules] if isinstance(modules, str) else list(modules)
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is not nn.Sequential and any(fnmatchcase(name, p) for p in patterns)
    }
    if not found:
        known = ", ".join(name for name, _ in model.named_modules() if name) or "none"
        raise ValueError(f"no module matches modules={modules!r}; the modules are: {known}")
    return found
