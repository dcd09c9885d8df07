"""`patch_torch()`: every caller of `torch.nn.utils.clip_grad_norm_` and its three companions gets
ours.
"""

from __future__ import annotations

import threading
from types import TracebackType

import torch

from fastguard import clip

_NAMES = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")
_PLACES = (torch.nn.utils, torch.nn.utils.clip_grad)
_lock = threading.RLock()
_originals: list[dict[str, object]] = []
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
    exactly what was there before. Code that did `from torch.nn.utils import clip_grad_norm_`
    *before* the patch holds torch's function and keeps it.

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
            for place in _PLACES:
                _originals.append({name: getattr(place, name) for name in _NAMES})
                for name in _NAMES:
                    setattr(place, name, getattr(clip, name))
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
            for place, originals in zip(_PLACES, _originals, strict=True):
                for name, original in originals.items():
                    setattr(place, name, original)
            _originals.clear()
