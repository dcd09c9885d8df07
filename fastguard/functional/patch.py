"""`patch_torch()`: replaces gradient functions of `torch.nn.utils` with functions of fastguard.

The results have the types that callers expect from torch. For DTensors, the norm is taken over the
ranks of their own mesh and is a DTensor: trainers call `full_tensor()` on it, and combine the norms
of pipeline stages themselves.
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
    """Calls `fastguard.clip_grad_norm_`, with the result type of torch's function."""
    parameters = listed(parameters, stacklevel=4)
    norm = clip.clip_grad_norm_(
        parameters, max_norm, norm_type, error_if_nonfinite, foreach, group=group, **ours
    )
    return _as_torch_type(norm, parameters, are_gradients=False)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Group = AS_TORCH,
) -> Tensor:
    """Calls `fastguard.get_total_norm`, with the result type of torch's function."""
    items = tensors if isinstance(tensors, Tensor) else as_list("tensors", tensors)
    norm = clip.get_total_norm(items, norm_type, error_if_nonfinite, foreach, group=group)
    return _as_torch_type(norm, items, are_gradients=True)


def _as_torch_type(norm: Tensor, items: Tensor | list, *, are_gradients: bool) -> Tensor:
    """Returns the norm; for DTensors, as a DTensor replicated over the first tensor's mesh."""
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


# Two of the four functions have private names in torch.nn.utils.clip_grad, which sharded trainers
# call.
_REPLACEMENTS: dict[ModuleType, dict[str, Any]] = {
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
    """The context manager that `patch_torch` returns: undoes the patch at the end of the block."""

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

    The patch applies to the whole process. Calls are counted. Each call needs one
    `unpatch_torch()`, and the last `unpatch_torch()` restores exactly the previous functions. Code
    that ran `from torch.nn.utils import get_total_norm` *before* the patch keeps torch's function.
    A `clip_grad_norm_` that was imported before the patch also remains torch's function, but
    computes norm and scaling with fastguard, because it looks up the functions for both under
    private names.

    The replacements also accept the keyword arguments of fastguard (`group=`, `nonfinite=`).
    Without these arguments, they behave as torch's functions: the norm of DTensors is taken over
    the ranks of their own mesh, and is a DTensor.

    Returns:
        A context manager that undoes this call.

    Example:
        >>> import torch, fastguard
        >>> large = [torch.full((4,), 1e20)]  # the squares overflow float32
        >>> with fastguard.patch_torch():
        ...     torch.nn.utils.get_total_norm(large)
        tensor(2.0000e+20)
        >>> torch.nn.utils.get_total_norm(large)
        tensor(inf)
    """
    global _depth
    with _lock:
        if _depth == 0:
            for place, names in _REPLACEMENTS.items():
                for name, ours in names.items():
                    _originals.append((place, name, getattr(place, name)))
                    setattr(place, name, ours)
        _depth += 1
    return _Patched()


def unpatch_torch() -> None:
    """Undoes one call of `patch_torch()`.

    Raises:
        RuntimeError: No call is left to undo.
    """
    global _depth
    with _lock:
        if _depth == 0:
            raise RuntimeError(
                "torch is not patched; call patch_torch() once before each unpatch_torch()"
            )
        _depth -= 1
        if _depth == 0:
            for place, name, original in _originals:
                setattr(place, name, original)
            _originals.clear()
