"""`patch_torch()`: every caller of `torch.nn.utils.clip_grad_norm_` and its three companions gets
ours.
"""

from __future__ import annotations

import threading
from types import ModuleType, TracebackType

import torch

from fastguard import clip

# In torch.nn.utils.clip_grad two of the four have private names, which sharded trainers call.
_PLACES: dict[ModuleType, dict[str, str]] = {
    torch.nn.utils: {
        name: name
        for name in (
            "clip_grad_norm_",
            "clip_grad_value_",
            "clip_grads_with_norm_",
            "get_total_norm",
        )
    },
    torch.nn.utils.clip_grad: {
        "clip_grad_norm_": "clip_grad_norm_",
        "clip_grad_value_": "clip_grad_value_",
        "_clip_grads_with_norm_": "clip_grads_with_norm_",
        "_get_total_norm": "get_total_norm",
    },
}
_lock = threading.RLock()
_originals: list[tuple[ModuleType, str, object]] = []
_depth = 0


class _Patched:
    """What `patch_torch` returns: undoes one patch on leaving a `with` block."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        unpatch_torch()


def patch_torch() -> _Patched:
    """Replaces the four gradient functions of `torch.nn.utils` and `torch.nn.utils.clip_grad`.

    Process-wide and counted: each call needs one `unpatch_torch()`, and the last one puts back
    exactly what was there before. Code that did `from torch.nn.utils import get_total_norm`
    *before* the patch holds torch's function and keeps it; a `clip_grad_norm_` held so is torch's
    too, but finds our norm and our scaling when it looks up the private names.

    Returns:
        A context manager that undoes this call.

    Example:
        >>> import torch, fastguard
        >>> with fastguard.patch_torch():
        ...     torch.nn.utils.clip_grad_norm_ is fastguard.clip_grad_norm_
        True
        >>> torch.nn.utils.clip_grad_norm_ is fastguard.clip_grad_norm_
        False
    """
    global _depth
    with _lock:
        if _depth == 0:
            for place, names in _PLACES.items():
                for theirs, ours in names.items():
                    _originals.append((place, theirs, getattr(place, theirs)))
                    setattr(place, theirs, getattr(clip, ours))
        _depth += 1
    return _Patched()


def unpatch_torch() -> None:
    """Undoes one `patch_torch()`.

    Raises:
        RuntimeError: Nothing is patched.
    """
    global _depth
    with _lock:
        if _depth == 0:
            raise RuntimeError(
                "torch is not patched: every unpatch_torch() needs a patch_torch() before"
            )
        _depth -= 1
        if _depth == 0:
            for place, name, original in _originals:
                setattr(place, name, original)
            _originals.clear()
