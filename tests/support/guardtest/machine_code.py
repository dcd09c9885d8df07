"""Compiles kernels ahead of time, without a GPU, and reads their machine code.

`python -m guardtest.machine_code [TARGET...] [only=BEGINNING]` prints one JSON line for each kernel
variant whose name has this beginning, and target. It must run in a separate process, without
TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUDA = (80, 90, 100)
SLOW_FP64 = (89, 120)  # `measure` differs on them; the other kernels do not
ROCM = ("gfx90a", "gfx942")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
ITEM_SIZE = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE
)


def compiled(
    launcher,
    signature: dict[str, str],
    constants: dict,
    target: int | str,
    threads: int | None = None,
):
    """Compiles a kernel for a target, with the options of its launcher.

    Args:
        launcher: A `fastguard.kernels.launch.Launcher`.
        signature: Type of each argument that is not a constant, such as `"*fp64"` or `"i32"`.
        constants: The constants.
        target: A CUDA architecture such as 90, or a ROCm one such as "gfx942".
        threads: Threads per program, for ROCm, whose warps are larger.
    """
    kernel = launcher.kernel
    options = dict(launcher.options)
    if isinstance(target, str):
        gpu = GPUTarget("hip", target, 64)
        options.pop("maxnreg", None)
        if threads is not None:
            options["num_warps"] = threads // 64
    else:
        gpu = GPUTarget("cuda", target, 32)
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    assert list(types) == list(kernel.arg_names), (list(types), kernel.arg_names)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs={})
    return triton.compile(source, target=gpu, options=options)


def sass(kernel) -> str:
    """Returns the machine code of a CUDA kernel as text."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
        run = subprocess.run(
            [TOOLS / "cuobjdump", "-sass", "-res-usage", cubin],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
            check=True,
        )
    return run.stdout + run.stderr


def read_cuda(kernel) -> dict:
    """Returns registers, spills, and counts of the main loop: the shortest with 128-bit loads.

    If the compiler unrolled the loop, the counts include all copies.
    """
    text = sass(kernel)
    code = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(text)]
    loops = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            start = int(target[1], 16)
            loops.append(Counter(n for a, n, _ in code if start <= a <= at))
    wide = [loop for loop in loops if _count(loop, "LDG", "128")]
    report = {
        "registers": int(re.search(r"\bREG:(\d+)", text)[1]),
        "spills": sum(name.startswith(("LDL", "STL")) for _, name, _ in code),
    }
    if wide:
        # The main loop has no barrier; loops that count non-finite elements do.
        main = min((w for w in wide if not _count(w, "BAR")), key=Counter.total)
        loads = _count(main, "LDG", "128")
        report |= {
            "loads": loads,
            "narrow_loads": _count(main, "LDG") - loads,
            "stores": _count(main, "STG", "128"),
            "narrow_stores": _count(main, "STG") - _count(main, "STG", "128"),
            "loop_spills": _count(main, "LDL") + _count(main, "STL"),
            "instructions": round(main.total() / loads, 1),
        }
    return report


def _count(loop: Counter, name: str, width: str = "") -> int:
    return sum(n for op, n in loop.items() if op.startswith(name) and width in op)


def read_rocm(kernel) -> dict:
    """Returns registers, spills, and 128-bit loads and stores of a ROCm kernel."""
    text = kernel.asm["amdgcn"]
    number = {
        what: int(re.search(rf"\.{what}:\s+(\d+)", text)[1])
        for what in ("vgpr_count", "vgpr_spill_count")
    }
    return {
        "registers": number["vgpr_count"],
        "spills": number["vgpr_spill_count"],
        "loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
    }


def variants():
    """Yields `(name, launcher, signature, constants)` of each variant to compile."""
    from fastguard.kernels import apply, decide, measure, record, summary, tuning, units
    from fastguard.stages.formulas import holds_norms

    table = {"addresses_ptr": "*i64", "chunks_ptr": "*i64", "pieces_ptr": "*i64"}
    walk = {
        **table,
        "scratch_ptr": "*i64",
        "partials_ptr": "*fp64",
        "counts_ptr": "*i64",
        "summary_ptr": "*fp64",
        "inv_scale_ptr": "*fp32",
        **dict.fromkeys(("n_chunks", "n_segments", "n_tensors"), "i32"),
    }
    reduce_size = {"REDUCE_SIZE": summary.REDUCE_SIZE}

    def measured(dtype, p=2.0, group=None, one=True, scale=True):
        torch_dtype = _torch_dtype(dtype)
        shape = tuning.tuning_of(p, torch_dtype)
        name = f"{dtype} p={p:g}" + (f" group {group}" if group else "")
        name += ("" if one else ", many segments") + ("" if scale else ", no scale")
        group = group or measure.group_of(torch_dtype, p, wide=True)
        rooted = holds_norms(torch_dtype, p)
        constants = measure.constants_of(torch_dtype, p, rooted, group, one, scale, shape)
        return f"measure {name}", measure.launcher_of(shape), walk, constants

    inf = float("inf")
    for dtype in TYPES:
        yield measured(dtype)
        yield measured(dtype, one=False, scale=False)
    for dtype, group in (("fp16", 8), ("bf16", 8), ("fp32", 4)):
        yield measured(dtype, group=group)
        yield measured(dtype, group=group, one=False)
    # Each dtype with every other norm, and both values of the two switches with each.
    yield measured("fp16", p=inf)
    yield measured("bf16", p=inf, one=False, scale=False)
    yield measured("fp32", p=inf)
    yield measured("fp64", p=inf, one=False)
    yield measured("fp16", p=1.0, one=False)
    yield measured("bf16", p=1.0, scale=False)
    yield measured("fp32", p=1.0)
    yield measured("fp64", p=1.0, one=False, scale=False)
    yield measured("fp16", p=3.0)
    yield measured("bf16", p=3.0, one=False)
    yield measured("fp32", p=3.0, scale=False)
    yield measured("fp64", p=3.0, one=False, scale=False)
    yield measured("fp32", p=8.0, one=False)
    columns = {
        "segment_starts_ptr": "*i64",
        "scratch_ptr": "*i64",
        "partials_ptr": "*fp64",
        "counts_ptr": "*i64",
        "summary_ptr": "*fp64",
        "inv_scale_ptr": "*fp64",
        "n_segments": "i32",
        "n_tensors": "i32",
    }
    for p, rooted, scale in (
        (3.0, False, True), (2.0, False, False), (inf, False, True), (2.0, True, True)
    ):  # fmt: skip
        norm = {"P": p, "INF_NORM": p == inf, "ROOTED": rooted, "HAS_SCALE": scale}
        name = f"reduce segments p={p:g}" + ("" if scale else ", no scale")
        name += ", norms" if rooted else ""
        yield name, summary._reduce, columns, {**norm, **reduce_size}
    scaling = {
        **table,
        "multiplier_ptr": "*fp64",
        "clean_ptr": "*fp32",
        "changes_ptr": "*fp32",
        "n_chunks": "i32",
    }
    for dtype, item in ITEM_SIZE.items():
        shape = {"BLOCK_SIZE": apply.BLOCK_BYTES // item, "VEC": 16 // item}
        for one in (True, False):
            kind = {"ONE_SEGMENT": one, "HAS_CHANGES": not one}
            constants = {"DTYPE": TYPES[dtype], "ITEM_SIZE": item, **kind, **shape}
            many = "" if one else ", many segments"
            yield f"apply {dtype}{many}", apply._apply, scaling, constants
    verdict = {name: "*fp64" for name in decide.decide_kernel.arg_names if name.endswith("_ptr")}
    verdict |= {
        "changes_ptr": "*fp32",
        "overflow_ptr": "*fp32",
        "counters_ptr": "*i64",
        "rings_ptr": "*i64",
        "found_inf_ptr": "*fp32",
        "clean_ptr": "*fp32",
        "reason_ptr": "*i64",
        "spikes_ptr": "*u8",
        "given_ptr": "*u8",
        "falls_ptr": "*u8",
    }
    sizes = ("n_segments", "max_norm_stride", "n_losses", "n_rules", "ring_stride")
    verdict |= dict.fromkeys(sizes, "i32")
    # (rules, segments, p, norms instead of power sums, mode, signals)
    for rules, segments, p, rooted, mode, has in (
        (0, 32, 2.0, False, "PROPAGATE", False),
        (0, 128, inf, False, "ZERO", True),
        (1, 32, 2.0, False, None, True),
        (4, 128, 3.0, False, "ZERO", True),
        (1, 128, 2.0, True, None, True),
        (1, 1024, 2.0, False, "ZERO", True),
    ):
        constants = {
            "P": p,
            "INF_NORM": p == inf,
            "ROOTED": rooted,
            "ZERO": mode == "ZERO",
            "PROPAGATE": mode == "PROPAGATE",
            "HAS_SCALE": has,
            "HAS_OVERFLOW": has,
            "HAS_FALLS": has,
            "HAS_GIVEN": has,
            "HAS_STATE": has,
            "RULES": rules,
            "WINDOW": 32 if rules else 1,
            "BLOCK_SIZE": segments,
        }
        name = f"decide p={p:g}, {rules} rules" + (", norms" if rooted else "")
        name += ", many segments" if segments > 128 else ""
        yield name, decide.launchers.of(segments), verdict, constants
    row = {name: "*fp64" for name in record.record_kernel.arg_names if name.endswith("_ptr")}
    row |= {
        "counts_ptr": "*i64",
        "found_inf_ptr": "*fp32",
        "clean_ptr": "*fp32",
        "reason_ptr": "*i64",
        "counters_ptr": "*i64",
        "spikes_ptr": "*u8",
        **dict.fromkeys(("n_segments", "n_tensors", "n_losses", "n_rules"), "i32"),
    }
    yield "record", record.launchers.of(1), row, {"BLOCK_SIZE": 128}
    yield "record, many segments", record.launchers.of(129), row, {"BLOCK_SIZE": 1024}
    rows = {"tensors_ptr": "*i64", "coefs_ptr": "*fp64", "n_units": "i32", "n_tensors": "i32"}
    of_units = {
        "tensors_ptr": "*i64",
        "limits_ptr": "*fp64",
        "coefs_ptr": "*fp64",
        "inv_scale_ptr": "*fp64",
        "n_units": "i32",
    }
    for dtype, item in ITEM_SIZE.items():
        powers = {"bf16": (2.0, inf), "fp32": (2.0, 3.0)}.get(dtype, (2.0,))
        for p in powers:
            propagates = p == 2.0
            both = (_torch_dtype(dtype),) * 2
            constants = units.coefs_constants(both, p, propagates, None)
            yield f"unit coefs {dtype} p={p:g}", units.coefs_launcher(p), of_units, constants
        shape = {"DTYPE": TYPES[dtype], "ITEM_SIZE": item, "BLOCK_BYTES": units.PLAIN.block_bytes}
        yield f"scale units {dtype}", units._scale, rows, shape


def watch_variants():
    """Yields the variants of the kernels that read bits and exponents."""
    from fastguard.kernels import watch

    bits = {"addresses_ptr": "*i64", "chunks_ptr": "*i64", "found_ptr": "*i64"}
    bits |= {"n_chunks": "i32", "n_segments": "i32"}
    cases = [(2, False, True), (2, True, True), (4, True, False), (4, False, True)]
    for item, nonzero, checksum in (*cases, (4, True, True), (8, True, True)):
        name = f"bits {8 * item}" + " nonzero" * nonzero + " checksum" * checksum
        yield name, watch._bits, bits, watch.bits_constants(item, nonzero, checksum)
    counts = {**dict.fromkeys(("addresses_ptr", "chunks_ptr", "pieces_ptr"), "*i64")}
    counts |= {"counts_ptr": "*i64", "inv_scale_ptr": "*fp64", "n_chunks": "i32", "stride": "i32"}
    constants = watch.exponents_constants(_torch_dtype("bf16"), True)
    yield "exponents bf16", watch._exponents, counts, constants


def update_variants():
    """Yields the variants of the update kernel, of `advance` and of update clipping."""
    from fastguard.kernels import formulas, update_clipping, update_launch, update_statistics

    names = ("chunks_ptr", "tensors_ptr", "addresses_ptr")
    pointers = {**dict.fromkeys(names, "*i64"), "coefficients_ptr": "*fp64"}
    pointers |= {"multiplier_ptr": "*fp64", "clean_ptr": "*fp32", "found_inf_ptr": "*fp32"}
    summed = pointers | {"sums_ptr": "*i64", "n_chunks": "i32"}
    pointers |= {"limits_ptr": "*fp64", "clipped_ptr": "*fp64", "partials_ptr": "*fp64"}
    pointers |= {"n_chunks": "i32"}
    # name, algorithm, (weight, gradient, states), options that differ from the default
    fp32, bf16 = ("fp32", "fp32", ("fp32", "fp32")), ("bf16", "bf16", ("bf16", "bf16"))
    mixed, counted = ("bf16", "bf16", ("fp32", "fp32")), {"statistics": True}
    cases = [
        ("adamw fp32", "adamw", fp32, {}),
        ("adamw fp32 reproducible", "adamw", fp32, {"reproducible": True}),
        ("adamw bf16", "adamw", bf16, {}),
        ("adamw bf16 stochastic", "adamw", bf16, {"stochastic": True}),
        (
            "adamw fp16 stochastic",
            "adamw",
            ("fp16", "fp16", ("fp32", "fp32")),
            {"stochastic": True},
        ),
        ("adamw bf16 reproducible", "adamw", bf16, {"reproducible": True}),
        ("adamw fp32 of bf16 gradients", "adamw", ("fp32", "bf16", ("fp32", "fp32")), {}),
        ("adamw master", "adamw", mixed, {"master": "float32"}),
        ("adamw remainder", "adamw", mixed, {"master": "remainder"}),
        ("adamw bf16 remainder", "adamw", bf16, {"master": "remainder", "stochastic": True}),
        ("adamw amsgrad", "adamw", ("fp32", "fp32", ("fp32",) * 3), {"amsgrad": True}),
        ("adamw fp32 spikes", "adamw", fp32, {"spike_aware": True}),
        ("adamw fp32 units", "adamw", fp32, {"clips_units": True}),
        ("adamw bf16 units", "adamw", bf16, {"clips_units": True, "propagates": True}),
        ("adamw remainder units", "adamw", mixed, {"master": "remainder", "clips_units": True}),
        ("adamw fp64", "adamw", ("fp64", "fp64", ("fp64", "fp64")), {}),
        ("adam fp16", "adam", ("fp16", "fp16", ("fp16", "fp16")), {}),
        ("sgd nesterov fp32", "sgd", ("fp32", "fp32", ("fp32",)), {"nesterov": True}),
        ("lion bf16", "lion", ("bf16", "bf16", ("bf16",)), {}),
        ("adamw fp32 statistics", "adamw", fp32, counted),
        ("adamw bf16 stochastic statistics", "adamw", bf16, counted | {"stochastic": True}),
        ("adamw remainder statistics", "adamw", mixed, counted | {"master": "remainder"}),
        ("adamw fp32 statistics units", "adamw", fp32, counted | {"clips_units": True}),
    ]
    for name, algorithm, (weight, gradient, states), options in cases:
        switches = {
            "master": None, "stochastic": False, "amsgrad": False, "nesterov": False,
            "reproducible": False, "spike_aware": False, "clips_units": False,
            "propagates": False, "statistics": False, **options,
        }  # fmt: skip
        dtypes = (_torch_dtype(weight), _torch_dtype(gradient), tuple(map(_torch_dtype, states)))
        number = formulas.ALGORITHMS[algorithm]
        constants = update_launch.constants_of(number, *dtypes, **switches)
        is_large = switches["clips_units"] or switches["statistics"]
        launcher = update_launch.launcher_of(switches["reproducible"], is_large)
        yield f"update {name}", launcher, pointers, constants
    steps = {"tensors_ptr": "*i64", "addresses_ptr": "*i64", "hyper_ptr": "*fp64"}
    steps |= {"found_inf_ptr": "*fp32", "coefficients_ptr": "*fp64", "n_tensors": "i32"}
    for algorithm, number in formulas.ALGORITHMS.items():
        stochastic = algorithm == "adamw"
        constants = {"ALGORITHM": number, "HAS_STEPS": True, "STOCHASTIC": stochastic}
        constants |= {"SPIKES": stochastic, "CLIPS": stochastic}
        constants["SIZE"] = formulas.ADVANCE_SIZE
        yield f"advance {algorithm}", formulas._advance, steps, constants
    for name, dtype, exact in (("fp32", "fp32", False), ("bf16 spikes", "bf16", True)):
        one = _torch_dtype(dtype)
        vector = update_launch.vector_size(one, one, (one, one), None)
        constants = update_clipping.constants_of(one, one, (one,), vector, exact, exact)
        launcher = update_clipping._exact if exact else update_clipping._fused
        yield f"ratio {name}", launcher, summed, constants
    ends = {"tensors_ptr": "*i64", "sums_ptr": "*i64", "found_inf_ptr": "*fp32"}
    ends |= {"coefficients_ptr": "*fp64", "n_tensors": "i32"}
    yield "rate", update_clipping._rate, ends, {"SIZE": formulas.ADVANCE_SIZE}
    sums = {"partials_ptr": "*fp64", "tensors_ptr": "*i64", "found_inf_ptr": "*fp32"}
    sums |= {"out_ptr": "*fp64", "n_chunks": "i32"}
    yield "combine", update_statistics._combine, sums, {"SIZE": update_statistics.SIZE}


def _torch_dtype(name: str):
    import torch

    return {
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "fp64": torch.float64,
    }[name]


def main(targets: list[str]) -> None:
    from fastguard.kernels.update_chunks import THREADS

    only = next((t[5:] for t in targets if t.startswith("only=")), "")
    targets = [t for t in targets if not t.startswith("only=")]
    wanted = [int(t) if t.isdigit() else t for t in targets] or [*CUDA, *SLOW_FP64, *ROCM]
    for name, launcher, signature, constants in itertools.chain(
        variants(), watch_variants(), update_variants()
    ):
        if only and not name.startswith(only):
            continue
        for target in wanted:
            if ("group" in name) is not (target in SLOW_FP64):
                continue
            if "statistics" in name and target != 90:
                continue  # one target suffices, since the other parts of the kernel are the same
            threads = THREADS if name.startswith(("update", "ratio")) else None
            kernel = compiled(launcher, signature, constants, target, threads)
            report = read_rocm(kernel) if isinstance(target, str) else read_cuda(kernel)
            line = {"kernel": name, "target": target, "triton": triton.__version__, **report}
            if "instructions" in report and name.startswith(("update", "ratio")):
                per_block = report["instructions"] * report["loads"]
                line["per_element"] = round(per_block / constants["VEC"], 1)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
