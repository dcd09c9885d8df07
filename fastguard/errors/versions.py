"""The differences between the supported versions of torch, from 2.8 to the newest.

No other module checks the version of torch. Differences between versions of Triton are in
`fastguard.kernels.versions`, because kernels import no other module of fastguard. `FEATURES` lists
what older versions of torch lack. The command `fastguard env` shows the list, and
docs/compatibility.md contains it as a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def numbers_of(version: str) -> tuple[int, ...]:
    """Returns the first two numbers of a version: `(2, 13)` for "2.13.0+cpu"."""
    return tuple(int(n) for n in version.split("+")[0].split(".")[:2] if n.isdecimal())


OLDEST_TORCH = (2, 8)
OLDEST_TRITON = (3, 4)
TORCH = numbers_of(torch.__version__)


class Feature(NamedTuple):
    """A feature that older versions of torch lack.

    Attributes:
        name: The name in the documentation.
        since: The first version of torch that has the feature.
        without: The behavior of older versions.
    """

    name: str
    since: tuple[int, int]
    without: str

    @property
    def missing(self) -> bool:
        """Whether the installed torch lacks the feature."""
        return self.since > TORCH


GRAD_DTYPE = Feature(
    "Tensor.grad_dtype",
    (2, 10),
    "a gradient has the dtype of its parameter, in flat buckets too",
)
FSDP_MEANS_ON_CPU = Feature(
    "averaging of gradients by fully_shard on CPUs",
    (2, 9),
    "gloo sums the gradients of the ranks instead, except with reduce_dtype=torch.float64",
)
SHARDED_ESTIMATES = Feature(
    "FakeTensorMode with collectives",
    (2, 10),
    "torch refuses to estimate the memory of sharded training (UnsupportedOperatorException)",
)
TENSOR_PLATEAU = Feature(
    "ReduceLROnPlateau with a tensor as learning rate",
    (2, 10),
    "ReduceLROnPlateau replaces the tensor with a number, and a captured CUDA graph keeps the old"
    " value",
)
STRICT_LAMBDAS = Feature(
    "LambdaLR that refuses a param group added later",
    (2, 10),
    "torch does not change the learning rate of the new group, and raises no error",
)
FUSED_ADAGRAD = Feature(
    "fused Adagrad that obeys found_inf",
    (2, 12),
    "guarding a fused Adagrad costs one device-to-host sync per step",
)
FEATURES = (
    FSDP_MEANS_ON_CPU,
    GRAD_DTYPE,
    SHARDED_ESTIMATES,
    TENSOR_PLATEAU,
    STRICT_LAMBDAS,
    FUSED_ADAGRAD,
)


def missing_features() -> dict[str, str]:
    """Returns the missing features by name, with the first version that has them and the effect."""
    return {
        feature.name: f"since torch {feature.since[0]}.{feature.since[1]}; {feature.without}"
        for feature in FEATURES
        if feature.missing
    }


def grad_dtype_of(p: Tensor) -> torch.dtype:
    """Returns the dtype that torch will give to the gradient of `p`.

    The first branch can be removed when 2.10 is the oldest supported torch.
    """
    if GRAD_DTYPE.missing:
        return p.dtype
    return p.grad_dtype or p.dtype  # a `grad_dtype` of None allows any dtype


def root_mesh_of(mesh: DeviceMesh) -> DeviceMesh:
    """Returns the mesh that a mesh was sliced from, or the mesh itself.

    torch before 2.10 keeps a table of roots; later versions store the root in the mesh. The table
    can be removed when 2.10 is the oldest supported torch.
    """
    if TORCH < (2, 10):
        from torch.distributed import device_mesh

        return device_mesh._mesh_resources.get_root_mesh(mesh)  # type: ignore[attr-defined]
    return mesh._get_root_mesh()


def tensor_guards(tensors: Sequence[Tensor]) -> Any:
    """Returns torch's check of the inputs of compiled code, for these tensors.

    The class is private, and identical in torch 2.8 to 2.13. A newer torch may rename the class or
    change its arguments, hence the broad `except`.

    Returns:
        An object whose `check(*tensors)` returns whether tensors have the same layout as these;
        None if this torch has no such check. Without the check, each step inspects every gradient
        again, which takes 0.05 µs per tensor and does not change the results.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guards if guards.check(*tensors) else None
    except Exception:
        return None


@contextmanager
def as_if_compiling() -> Iterator[None]:
    """Makes `torch.compiler.is_compiling()` return True, for tracing without dynamo.

    torch's optimizers then compute with tensors only. The flag is private, and identical in torch
    2.8 to 2.13.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before
