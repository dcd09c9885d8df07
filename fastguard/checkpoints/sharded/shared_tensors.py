"""Finds the tensors that all ranks share, and the names under which a checkpoint stores them.

A DTensor belongs to all ranks of its mesh. A plain tensor with the same bytes on every rank (DDP)
is stored once; otherwise (pipeline stages, experts, batch statistics) each rank stores its own
tensor. No configuration is needed, because the ranks compare the bytes. This costs one SHA-256 over
the plain tensors per save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastguard.checkpoints.errors import CheckpointError
from fastguard.ranks.lockstep import Peers
from fastguard.ranks.span import ranks_of

Identity = tuple[str, str]  # "mesh", "bytes" or "own", and a digest


def is_shard(value: Any) -> bool:
    """Whether a value is a DTensor. Imports nothing if torch.distributed is not used."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested containers, each with its path."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from tensors(value, f"{path}.{i}" if path else str(i))


def names_of_shared(tree: Any, peers: Peers) -> dict[str, str]:
    """Maps the path of every tensor that ranks share to the name it is stored under.

    Raises:
        CheckpointError: A DTensor is spread over more ranks than write the checkpoint.
    """
    if peers.size == 1:
        shards = {path: t for path, t in tensors(tree) if is_shard(t)}
        for path, shard in shards.items():
            n_ranks = shard.device_mesh.size()  # type: ignore[attr-defined]
            if n_ranks > 1:
                raise CheckpointError(
                    f"{path} is spread over {n_ranks} ranks, but one process saves it; open the "
                    "store on all of these ranks with CheckpointStore(..., "
                    "group=torch.distributed.group.WORLD)"
                )
        return {path: path for path in shards}
    mine = {path: _identity(t) for path, t in tensors(tree)}
    summary = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
    # The usual case of FSDP and DDP: all ranks have the same tensors.
    if len(set(peers.gather(summary))) == 1:
        return {path: path for path, (kind, _) in mine.items() if kind != "own"}
    everyone = peers.gather(mine)
    return {
        path: name
        for path, own in mine.items()
        if (name := _name(path, own, [theirs.get(path) for theirs in everyone])) is not None
    }


def _name(path: str, own: Identity, theirs: list[Identity | None]) -> str | None:
    kind, digest = own
    if kind == "mesh":
        alone = {other for other in theirs if other is not None} == {own}
        # Pipeline stages use the same parameter numbers, each on its own mesh.
        return path if alone else f"{path}@{digest[:16]}"
    return path if kind == "bytes" and all(other == own for other in theirs) else None


def _identity(tensor: Tensor) -> Identity:
    if is_shard(tensor):
        mesh = ranks_of(tensor.device_mesh)  # type: ignore[attr-defined]
        return "mesh", hashlib.sha256(repr((mesh, tuple(tensor.shape))).encode()).hexdigest()
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return "own", ""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    found = hashlib.sha256(repr((tensor.dtype, tuple(tensor.shape))).encode())
    found.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  (arrays are buffers)
    return "bytes", found.hexdigest()
