"""Buffers of one device and dtype side by side: gathered, judged and put back all at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastguard.gradients.transfer import moved
from fastguard.ranks.dtensors import local_parts

_WHERE_KNOWS = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.complex128, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Place:
    """Where a module holds a buffer: a name in a table, under which another one may be put.

    Args:
        module: Whose table it is; None: nobody's.
        table: Its `_buffers`.
        name: The entry.
        path: What to call it.

    Attributes:
        buffer: What was there at the last look; None: nothing.
        had_values: Whether it had values then; a lazy buffer gets them in the first forward pass.
        plain: The same memory as a plain tensor with a version counter of its own, since putting
            back must not invalidate a graph that still waits for its backward pass. None: it is
            no such tensor.
    """

    def __init__(self, module: nn.Module | None, table: dict[str, Any], name: str, path: str):
        self._module, self._table, self._name = module, table, name
        self.path: str = path
        self.look()

    def look(self) -> None:
        """Takes in what is there now."""
        self.buffer: Any = self._table.get(self._name)
        self.had_values: bool = _has_values(self.buffer)
        self._kind = type(self.buffer)
        self._part = _part(self.buffer)
        self.plain: Tensor | None = None if self._part is None else self._part.data
        self._memory = None if self.plain is None else (self.plain.data_ptr(), self.plain.numel())

    def is_as_before(self) -> bool:
        """Whether the same tensor is still there, with the same memory."""
        now, part = self._table.get(self._name), self._part
        if now is not self.buffer or type(now) is not self._kind:  # lazy ones change their type
            return False
        return part is None or (part.data_ptr(), part.numel()) == self._memory

    @property
    def can_change(self) -> bool:
        """Whether a module can write into it: it has values, and no two at one place in memory."""
        return self.had_values and not _overlaps(self.buffer)

    def mend(self, kept: Tensor, *, whole: bool) -> None:
        """Puts the kept values into what is there now, or at least where that is not finite.

        Args:
            kept: The buffer as it was.
            whole: All of them, also with their old shape.
        """
        now: Any = self._table.get(self._name)
        if not _has_values(now):
            return
        part = _part(now)
        if part is None:
            if whole:
                now.copy_(kept)
            return
        if part.shape != kept.shape:
            if not whole:
                return
            if now is self.buffer:
                part.resize_(kept.shape)
            else:
                part = self._table[self._name] = torch.empty_like(kept, device=part.device)
        kept = kept.to(part.device, part.dtype)
        part.data.copy_(kept if whole else torch.where(is_bad(part), kept, part))

    def start_anew(self) -> bool:
        """Where no values were known: as the module makes them; False if it cannot."""
        reset = getattr(self._module, "reset_running_stats", None)
        if reset is not None:
            reset()
        return reset is not None

    def is_finite(self) -> bool:
        """Whether what is there now is, as far as can be told. Waits for a GPU."""
        part = _part(self._table.get(self._name))
        return part is None or not bool(is_bad(part).any())

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_module", "_table", "_name", "path")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.look()


class Batch:
    """Buffers of one device and dtype, and what they were."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places
        self._buffers = [place.plain for place in places if place.plain is not None]
        (first, *_), sizes = self._buffers, [b.numel() for b in self._buffers]
        self._kept = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self._now = torch.empty_like(self._kept)
        self._kept_views, self._now_views = (
            [v.view(b.shape) for v, b in zip(flat.split(sizes), self._buffers, strict=True)]
            for flat in (self._kept, self._now)
        )
        self._is_judged = _can_be_bad(first.dtype)
        self.mended: Tensor = torch.zeros((), dtype=torch.int64, device=first.device)
        self.keep()

    def keep(self) -> None:
        """Copies the buffers, as what `put_back` restores."""
        torch._foreach_copy_(self._kept_views, self._buffers)

    def put_back(self) -> None:
        """Restores the buffers from the copies."""
        torch._foreach_copy_(self._buffers, self._kept_views)

    def kept_by_place(self) -> dict[Place, Tensor]:
        """Returns the copy of each buffer."""
        return dict(zip(self._places, self._kept_views, strict=True))

    def settle(self, undo: bool | Tensor) -> bool:
        """After a step: puts back all, or what is not finite, and keeps the rest.

        Args:
            undo: Whether all go back; a tensor `()` where only a GPU knows, and nobody waits.

        Returns:
            Whether something that is not finite was found after a step that stays; never so where
            that could only be known by waiting.
        """
        if undo is True:
            self.put_back()
            return False
        if undo is False and not self._is_judged:
            self.keep()
            return False
        torch._foreach_copy_(self._now_views, self._buffers)
        self._bad = bad = is_bad(self._now)
        on_host = undo is False and bad.device.type == "cpu"
        if on_host and not bad.any():
            self._kept.copy_(self._now)
            return False
        if isinstance(undo, Tensor):
            undo = moved(undo, bad.device)
            self.mended += (bad & ~undo).sum()
            bad = bad | undo
        else:
            self.mended += bad.sum()
        kept, now = _selectable(self._kept), _selectable(self._now)
        torch.where(bad, kept, now, out=kept)
        self.put_back()
        return on_host

    def bad_names(self) -> Iterator[str]:
        """Which buffers `settle` found not to be finite. Waits for a GPU."""
        sizes = [view.numel() for view in self._kept_views]
        for place, bad in zip(self._places, self._bad.split(sizes), strict=True):
            if bad.any():
                yield place.path


def _has_values(buffer: Any) -> bool:
    return isinstance(buffer, Tensor) and not (is_lazy(buffer) or buffer.is_meta)


def _part(buffer: Any) -> Tensor | None:
    """The plain tensor that a buffer is, or that this rank holds of it; None: there is none."""
    if not _has_values(buffer):
        return None
    (part,) = local_parts([buffer])
    if type(part) not in (Tensor, nn.Parameter) or part.layout is not torch.strided:
        return None
    if part.is_quantized or part.is_inference() or _overlaps(part):
        return None
    return part


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: nothing can be written there."""
    if tensor.layout is not torch.strided:
        return False
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _selectable(flat: Tensor) -> Tensor:
    """The same memory in a dtype that `torch.where` takes."""
    return flat if flat.dtype in _WHERE_KNOWS else flat.view(_BITS[flat.dtype.itemsize])


def _can_be_bad(dtype: torch.dtype) -> bool:
    """Whether it has NaN; packed 4-bit floats have none."""
    return (dtype.is_floating_point or dtype.is_complex) and "float4" not in str(dtype)


def is_bad(tensor: Tensor) -> Tensor:
    """Which elements are NaN or Inf."""
    if not _can_be_bad(tensor.dtype):
        return torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    if tensor.dtype not in _WHERE_KNOWS:  # 8-bit floats
        tensor = tensor.float()
    return ~tensor.isfinite()
