"""The code that inductor generates for a GPU, without one: `python -m guardtest.cuda_code AdamW`.

Simulated tensors claim to be on a GPU. The code is generated but never loaded. Run this in a
separate process, because it makes torch assume that there is a device. It prints one JSON object
per optimizer.
"""

from __future__ import annotations

import json
import re
import sys
import types
from contextlib import ExitStack
from unittest import mock

import torch
from torch._dynamo import device_interface
from torch._functorch.aot_autograd import aot_function
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor

from fastguard.guard import masked_update, placeholder_optimizer
from fastguard.guard.compiled_state import StateForUpdate
from guardtest.compiled import OPTIMIZERS

CARD = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    warp_size=32,
    total_memory=141 << 30,
    shared_memory_per_multiprocessor=233472,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
    L2_cache_size=50 << 20,
    uuid="x",
)


class Pretended(device_interface.CudaInterface):
    """Device properties that inductor queries."""

    class Worker(device_interface.CudaInterface.Worker):
        get_device_properties = staticmethod(lambda device=None: CARD)
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)

    current_device = staticmethod(lambda: 0)
    is_available = staticmethod(lambda: True)
    get_compute_capability = staticmethod(lambda device=None: 90)
    get_device_properties = staticmethod(lambda device=None: CARD)
    device_count = staticmethod(lambda: 1)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    exchange_device = staticmethod(lambda device: 0)
    maybe_exchange_device = staticmethod(lambda device: 0)
    synchronize = staticmethod(lambda device=None: None)


PRETENCES = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_capability": lambda device=None: (9, 0),
    "torch.cuda.get_device_properties": lambda device=None: CARD,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda._lazy_init": lambda: None,
    "torch.version.cuda": "13.0",
    "torch.utils._triton.triton_hash_with_backend": lambda: "none",
    "torch.cuda.is_initialized": lambda: False,
    "torch.cuda.get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8),
    "torch.cuda.set_rng_state": lambda *a: None,
}


class _Done(Exception):
    """Ends the compilation and carries the generated code."""


def _on_gpu(x, mode):
    if not isinstance(x, torch.Tensor):
        return x
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return FakeTensor(mode, meta, torch.device("cuda", 0))


def _compile(graph, inputs):
    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = torch.utils._pytree.tree_map(
                lambda x: _on_gpu(x, mode), node.meta["val"]
            )
        if node.op == "call_function" and node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    inputs = [_on_gpu(x, mode) for x in inputs]
    lowered = GraphLowering(
        graph, example_inputs=inputs, is_inference=True, shape_env=mode.shape_env
    )
    handlers = (
        V.set_graph_handler(lowered),
        V.set_fake_mode(mode),
        V.set_debug_handler(DebugContext()),
    )
    with handlers[0], handlers[1], handlers[2]:
        lowered.run(*inputs)
        code = lowered.codegen()[0]
    raise _Done(getattr(code, "value", code))


def code_of(graph, inputs) -> str:
    """The code for a graph with inputs of these shapes."""
    with ExitStack() as stack:
        for name, value in PRETENCES.items():
            stack.enter_context(mock.patch(name, value))
        options = "torch._inductor.runtime.triton_helpers.get_backend_options"
        stack.enter_context(mock.patch(options, dict, create=True))
        stack.enter_context(torch.no_grad())
        traced = aot_function(
            lambda *xs: graph(*xs),
            fw_compiler=_compile,
            inference_compiler=_compile,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        try:
            traced(*inputs)
        except _Done as done:
            return done.args[0]
    raise AssertionError("nothing was compiled")


def counts_of(code: str, largest: int) -> dict[str, object]:
    """Counts the launches, allocations and copies of the code.

    Args:
        code: The code.
        largest: The number of elements of an allocation from which it counts as large.
    """
    shapes = re.findall(r"empty_strided_cuda\(\(([^)]*)\)", code)
    sizes = [torch.Size(int(n) for n in re.findall(r"\d+", s)).numel() for s in shapes]
    return {
        "kernels": len(re.findall(r"async_compile\.triton\('", code)),
        "launches": len(re.findall(r"\.run\(", code)),
        "large allocations": sum(n >= largest for n in sizes),
        "loads": len(re.findall(r"tl\.load\(", code)),
        "stores": len(re.findall(r"tl\.store\(", code)),
        "matrix products": len(re.findall(r"extern_kernels\.", code)),
        "waits": len(re.findall(r"\.item\(\)|\.cpu\(|\.copy_\(|= empty_strided_cpu\(", code)),
    }


def main(name: str, masked: bool, n: int) -> dict[str, object]:
    make, shapes = OPTIMIZERS[name]
    shapes = [(64, 64 + 16 * i) for i in range(n)] if n else shapes
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(params)
    StateForUpdate(optimizer).prepare(params, [0] * len(params))
    members = placeholder_optimizer.Members.of(
        optimizer, params, [0] * len(params), [0] * len(params)
    )
    lr = torch.full((), optimizer.param_groups[0]["lr"])
    settings = {placeholder_optimizer.Place(0, "lr"): lr}
    with (
        mock.patch.object(placeholder_optimizer, "_implementation", lambda *_: FORM),
        torch.no_grad(),
    ):
        patch = mock.patch.object(torch, "where", _unmasked)
        with ExitStack() as stack:
            if not masked:
                stack.enter_context(patch)
            graph = masked_update.trace(optimizer, members, settings).graph
    scalar = torch.zeros(())
    verdict = scalar, torch.ones(1, dtype=torch.float64), scalar.clone()
    code = code_of(graph, [*verdict, *[x.detach() for x in members.inputs(optimizer)], lr])
    return {"optimizer": name, **counts_of(code, min(p.numel() for p in params))}


FORM = [("capturable", True), ("fused", False), ("foreach", True)]
_where = torch.where


def _unmasked(condition, kept, new):
    """Replaces `torch.where`, so that the writes of a step are not masked."""
    if condition.dtype is torch.bool and not condition.dim() and isinstance(kept, torch.Tensor):
        return new
    return _where(condition, kept, new)


if __name__ == "__main__":
    torch._inductor.config.compile_threads = 1
    # Otherwise a later call would replace these two.
    list(device_interface.get_registered_device_interfaces())
    device_interface.register_interface_for_device("cuda", Pretended)
    device_interface.register_interface_for_device("cuda:0", Pretended)
    n = int(sys.argv[1])
    for argument in sys.argv[2:]:
        name, _, how = argument.partition("/")
        print(json.dumps(main(name, how != "unmasked", n)), flush=True)
