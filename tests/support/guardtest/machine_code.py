"""Compiles kernels ahead of time, without a GPU, and reads their machine code.

`python -m guardtest.machine_code [TARGET...] [only=BEGINNING]` prints one JSON line for each target
and each kernel variant whose name has this beginning. It must run in a separate process, without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from guardtest.kernel_variants import variants

CUDA = (80, 90, 100)
SLOW_FP64 = (89, 120)  # `measure` has different code for them; the other kernels do not
ROCM = ("gfx90a", "gfx942")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

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
        target: A CUDA architecture such as 90, or a ROCm architecture such as "gfx942".
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


def main(targets: list[str]) -> None:
    from fastguard.kernels.update_chunks import THREADS

    only = next((t[5:] for t in targets if t.startswith("only=")), "")
    targets = [t for t in targets if not t.startswith("only=")]
    wanted = [int(t) if t.isdigit() else t for t in targets] or [*CUDA, *SLOW_FP64, *ROCM]
    for name, launcher, signature, constants in variants():
        if only and not name.startswith(only):
            continue
        for target in wanted:
            if ("group" in name) is not (target in SLOW_FP64):
                continue
            if "statistics" in name and target != 90:
                continue  # one target suffices, because the other parts of the kernel are the same
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
