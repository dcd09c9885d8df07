"""`patch_torch()`: every caller of `torch.nn.utils.clip_grad_norm_` and its three companions gets
ours.

Callers expect what torch returns: for DTensors a norm that is a DTensor, over the ranks of their
own mesh. A trainer calls `full_tensor()` on it, and adds up pipeline stages itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import ModuleType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastguard.functional import clip
from fastguard.functional.arguments import Parameters, as_list, listed
from fastguard.gradients.buckets import parameters_of
from fastguard.ranks.dtensors import dtensor_types
from fastguard.ranks.groups import AS_TORCH, Group


def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Group = AS_TORCH,
    **ours: Any,
) -> Tensor:
    """`fastguard.clip_grad_norm_` in place of torch's function."""
    parameters = listed(parameters, stacklevel=4)
    norm = clip.clip_grad_norm_(
        parameters, max_norm, norm_type, error_if_nonfinite, foreach, group=group, **ours
    )
    return _as_torch_returns_it(norm, parameters, are_gradients=False)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Group = AS_TORCH,
) -> Tensor:
    """`fastguard.get_total_norm` in place of torch's function."""
    items = tensors if isinstance(tensors, Tensor) else as_list("tensors", tensors)
    norm = clip.get_total_norm(items, norm_type, error_if_nonfinite, foreach, group=group)
    return _as_torch_returns_it(norm, items, are_gradients=True)


def _as_torch_returns_it(norm: Tensor, items: Tensor | list, *, are_gradients: bool) -> Tensor:
    """The norm of DTensors as a DTensor, replicated over the mesh of the first of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return norm
    tensors = parameters_of(items)
    if not dtensor_types(set(map(type, tensors))):
        return norm
    from torch.distributed.tensor import DTensor, Replicate

    grads = tensors if are_gradients else [p.grad for p in tensors]
    mesh = next((grad.device_mesh for grad in grads if isinstance(grad, DTensor)), None)
    if mesh is None:
        return norm
    return DTensor.from_local(norm, mesh, [Replicate()] * mesh.ndim, run_check=False)


# In torch.nn.utils.clip_grad two of the four have private names, which sharded trainers call.
_PLACES: dict[ModuleType, dict[str, Any]] = {
    torch.nn.utils: {
        "clip_grad_norm_": clip_grad_norm_,
        "clip_grad_value_": clip.clip_grad_value_,
        "clip_grads_with_norm_": clip.clip_grads_with_norm_,
        "get_total_norm": get_total_norm,
    },
    torch.nn.utils.clip_grad: {
        "clip_grad_norm_": clip_grad_norm_,
        "clip_grad_value_": clip.clip_grad_value_,
        "_clip_grads_with_norm_": clip.clip_grads_with_norm_,
        "_get_total_norm": get_total_norm,
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

    What they find takes our keyword arguments too (`group=`, `nonfinite=`). Without them it means
    what torch's function means: the norm of DTensors is one over the ranks of their own mesh, and
    comes back as a DTensor.

    Returns:
        A context manager that undoes this call.

    Example:
        >>> import torch, fastguard
        >>> large = [torch.full((4,), 1e20)]  # its squares leave float32
        >>> with fastguard.patch_torch():
        ...     torch.nn.utils.get_total_norm(large)
        tensor(2.0000e+20)
        >>> torch.nn.utils.get_total_norm(large)
        tensor(inf)
    """
    global _depth
    with _lock:
        if _depth == 0:
            for place, names in _PLACES.items():
                for name, ours in names.items():
                    _originals.append((place, name, getattr(place, name)))
                    setattr(place, name, ours)
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
