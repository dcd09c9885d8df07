"""Saves, checks and restores all buffers of one device and dtype in one operation."""

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
    """The location of a buffer in a module: an entry in a dict, which may be replaced.

    Args:
        module: The module; None for tensors that are not buffers.
        table: The `_buffers` of the module.
        name: The key in `table`.
        path: The name in messages.

    Attributes:
        buffer: The tensor at the last call of `look`; None: no tensor.
        had_values: Whether the tensor had values at that call; a lazy buffer gets them in the first
            forward pass.
        plain: A plain tensor that shares the buffer's memory but has its own version counter, so
            that restoring values does not invalidate a graph whose backward pass has not run yet.
            None: the buffer cannot be viewed as a plain tensor.
    """

    def __init__(self, module: nn.Module | None, table: dict[str, Any], name: str, path: str):
        self._module, self._table, self._name = module, table, name
        self.path: str = path
        self.look()

    def look(self) -> None:
        """Reads the current tensor."""
        self.buffer: Any = self._table.get(self._name)
        self.had_values: bool = _has_values(self.buffer)
        self._kind = type(self.buffer)
        self._part = _part(self.buffer)
        self.plain: Tensor | None = None if self._part is None else self._part.data
        self._memory = None if self.plain is None else (self.plain.data_ptr(), self.plain.numel())

    def is_as_before(self) -> bool:
        """Whether the current tensor is the one of the last `look`, with the same memory."""
        now, part = self._table.get(self._name), self._part
        if now is not self.buffer or type(now) is not self._kind:  # lazy buffers change type
            return False
        return part is None or (part.data_ptr(), part.numel()) == self._memory

    @property
    def can_change(self) -> bool:
        """Whether a module can write into the buffer, whose elements must not overlap."""
        return self.had_values and not _overlaps(self.buffer)

    def mend(self, kept: Tensor, *, whole: bool) -> None:
        """Copies saved values into the current tensor.

        Args:
            kept: The saved buffer.
            whole: True: restores all values, and the shape; False: only non-finite elements.
        """
        now: Any = self._table.get(self._name)
        if not _has_values(now):
            return
        part = _part(now)
        if part is None:
            if _overlaps(now):
                if now is not self.buffer:
                    kept = kept.to(now.device, now.dtype)
                    self._table[self._name] = kept if whole else torch.where(is_bad(now), kept, now)
            elif whole:
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

    def reset(self) -> bool:
        """Resets a buffer with its module's own method; False if there is no such method."""
        reset = getattr(self._module, "reset_running_stats", None)
        if reset is not None:
            reset()
        return reset is not None

    def is_finite(self) -> bool:
        """Whether the current tensor is finite, as far as this can be checked. Waits for a GPU."""
        part = _part(self._table.get(self._name))
        return part is None or not bool(is_bad(part).any())

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_module", "_table", "_name", "path")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.look()


class Batch:
    """Buffers of one device and dtype, and their saved values."""

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
        """Saves the current values."""
        torch._foreach_copy_(self._kept_views, self._buffers)

    def put_back(self) -> None:
        """Restores the saved values."""
        torch._foreach_copy_(self._buffers, self._kept_views)

    def kept_by_place(self) -> dict[Place, Tensor]:
        """Returns the saved values by location."""
        return dict(zip(self._places, self._kept_views, strict=True))

    def settle(self, undo: bool | Tensor) -> bool:
        """Restores all values, or only non-finite elements, and saves the other values.

        Args:
            undo: Whether to restore all values; on a GPU a tensor `()`, which is not read.

        Returns:
            Whether non-finite elements were found after an applied step. False if only the GPU
            knows the result.
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
        """Yields the names of the buffers in which `settle` found non-finite elements.

        Waits for a GPU.
        """
        sizes = [view.numel() for view in self._kept_views]
        for place, bad in zip(self._places, self._bad.split(sizes), strict=True):
            if bad.any():
                yield place.path


def _has_values(buffer: Any) -> bool:
    return isinstance(buffer, Tensor) and not (is_lazy(buffer) or buffer.is_meta)


def _part(buffer: Any) -> Tensor | None:
    """Returns the local part of a buffer as a plain tensor; None if there is no such tensor."""
    if not _has_values(buffer):
        return None
    (part,) = local_parts([buffer])
    if type(part) not in (Tensor, nn.Parameter) or part.layout is not torch.strided:
        return None
    if part.is_quantized or part.is_inference() or _overlaps(part):
        return None
    return part


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor, which cannot be written to."""
    if tensor.layout is not torch.strided:
        return False
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _selectable(flat: Tensor) -> Tensor:
    """Returns the same memory with a dtype that `torch.where` supports."""
    return flat if flat.dtype in _WHERE_KNOWS else flat.view(_BITS[flat.dtype.itemsize])


def _can_be_bad(dtype: torch.dtype) -> bool:
    """Whether a dtype has NaN; packed 4-bit floats have none."""
    return (dtype.is_floating_point or dtype.is_complex) and "float4" not in str(dtype)


def is_bad(tensor: Tensor) -> Tensor:
    """Returns a mask of the elements that are NaN or Inf."""
    if not _can_be_bad(tensor.dtype):
        return torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    if tensor.dtype not in _WHERE_KNOWS:  # 8-bit floats
        tensor = tensor.float()
    return ~tensor.isfinite()
