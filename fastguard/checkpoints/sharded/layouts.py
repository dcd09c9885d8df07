"""Chooses the mesh and the placements of loaded tensors in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastguard.checkpoints.sharded.shared_tensors import is_shard, tensors


class Layouts:
    """The mesh and the placements of each loaded tensor in this process.

    A tensor gets the mesh and placements of the tensor with the same name in the objects to
    restore. If there is no such tensor, as for optimizer state that does not exist yet, a tensor
    with the same shape and placements is used instead. Otherwise, the saved placements are used, on
    the mesh with the saved shape, or on the only mesh with that number of dimensions. If no mesh
    fits, the whole tensor is loaded as a plain tensor.

    Args:
        objects: The objects to restore, by name.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._known: dict[str, Any] = {}
        for name, value in objects.items():
            if callable(getattr(value, "state_dict", None)):
                found = tensors(value.state_dict(), name)
                self._known |= {path: t for path, t in found if is_shard(t)}
        # Stores a tensor and not only its placements: with FSDP and tensor parallelism, a dimension
        # is sharded twice, in an order that the saved placements do not contain.
        self._alike = {(tuple(t.shape), _sharded(t.placements)): t for t in self._known.values()}
        self._meshes = {tuple(t.device_mesh.shape): t.device_mesh for t in self._known.values()}

    def empty(self, path: str, stored: Any, marker: Mapping[str, Any]) -> Tensor:
        """Returns an empty tensor to read into.

        Args:
            path: Position in the tree.
            stored: The metadata of the tensor.
            marker: The placeholder in the saved tree.
        """
        size, dtype = stored.size, stored.properties.dtype
        mesh, placements = self._layout(path, tuple(size), marker)
        if mesh is None:
            return torch.empty(size, dtype=dtype)
        from torch.distributed.tensor import empty

        return empty(*size, dtype=dtype, device_mesh=mesh, placements=placements)

    def _layout(
        self, path: str, size: tuple[int, ...], marker: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        if not marker["mesh"]:
            return None, ()
        own = self._known.get(path, self._alike.get((size, tuple(marker["placements"]))))
        if own is not None:
            return own.device_mesh, own.placements
        from torch.distributed.tensor import Replicate, Shard

        shape = tuple(marker["mesh"])
        alike = [mesh for known, mesh in self._meshes.items() if len(known) == len(shape)]
        mesh = self._meshes.get(shape) or (alike[0] if len(alike) == 1 else None)
        return mesh, [Replicate() if d is None else Shard(d) for d in marker["placements"]]


def _sharded(placements: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(p.dim if p.is_shard() else None for p in placements)
