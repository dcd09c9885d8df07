"""The variants of the kernels whose machine code is read, with constants and argument types."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import triton.language as tl

TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
ITEM_SIZE = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
TABLE = {"addresses_ptr": "*i64", "chunks_ptr": "*i64", "pieces_ptr": "*i64"}
UPDATED = {
    **dict.fromkeys(("chunks_ptr", "tensors_ptr", "addresses_ptr"), "*i64"),
    "coefficients_ptr": "*fp64",
    "multiplier_ptr": "*fp64",
    "clean_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
}

Variants = Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]


def variants() -> Variants:
    """Yields `(name, launcher, signature, constants)` of each variant to compile."""
    return itertools.chain(
        measure_variants(),
        reduce_variants(),
        apply_variants(),
        decide_variants(),
        record_variants(),
        unit_variants(),
        watch_variants(),
        update_variants(),
        update_end_variants(),
    )


def measure_variants() -> Variants:
    """Yields the variants of the kernel that measures."""
    from fastguard.kernels import measure, tuning
    from fastguard.stages.formulas import holds_norms

    walk = {
        **TABLE,
        "scratch_ptr": "*i64",
        "partials_ptr": "*fp64",
        "counts_ptr": "*i64",
        "summary_ptr": "*fp64",
        "inv_scale_ptr": "*fp32",
        **dict.fromkeys(("n_chunks", "n_segments", "n_tensors"), "i32"),
    }

    def measured(dtype, p=2.0, group=None, one=True, scale=True):
        torch_dtype = _torch_dtype(dtype)
        shape = tuning.tuning_of(p, torch_dtype)
        name = f"{dtype} p={p:g}" + (f" group {group}" if group else "")
        name += ("" if one else ", many segments") + ("" if scale else ", no scale")
        group = group or measure.group_of(torch_dtype, p, wide=True)
        rooted = holds_norms(torch_dtype, p)
        constants = measure.constants_of(torch_dtype, p, rooted, group, one, scale, shape)
        return f"measure {name}", measure.launcher_of(shape), walk, constants

    for dtype in TYPES:
        yield measured(dtype)
        yield measured(dtype, one=False, scale=False)
    for dtype, group in (("fp16", 8), ("bf16", 8), ("fp32", 4)):
        yield measured(dtype, group=group)
        yield measured(dtype, group=group, one=False)
    # Each dtype with every other norm, and each norm with both values of the two switches.
    yield measured("fp16", p=math.inf)
    yield measured("bf16", p=math.inf, one=False, scale=False)
    yield measured("fp32", p=math.inf)
    yield measured("fp64", p=math.inf, one=False)
    yield measured("fp16", p=1.0, one=False)
    yield measured("bf16", p=1.0, scale=False)
    yield measured("fp32", p=1.0)
    yield measured("fp64", p=1.0, one=False, scale=False)
    yield measured("fp16", p=3.0)
    yield measured("bf16", p=3.0, one=False)
    yield measured("fp32", p=3.0, scale=False)
    yield measured("fp64", p=3.0, one=False, scale=False)
    yield measured("fp32", p=8.0, one=False)


def reduce_variants() -> Variants:
    """Yields the variants of the kernel that reduces many segments."""
    from fastguard.kernels import summary

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
        (3.0, False, True), (2.0, False, False), (math.inf, False, True), (2.0, True, True)
    ):  # fmt: skip
        norm = {"P": p, "INF_NORM": p == math.inf, "ROOTED": rooted, "HAS_SCALE": scale}
        name = f"reduce segments p={p:g}" + ("" if scale else ", no scale")
        name += ", norms" if rooted else ""
        yield name, summary._reduce, columns, {**norm, "REDUCE_SIZE": summary.REDUCE_SIZE}


def apply_variants() -> Variants:
    """Yields the variants of the kernel that scales and cleans."""
    from fastguard.kernels import apply

    scaling = {
        **TABLE,
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


def decide_variants() -> Variants:
    """Yields the variants of the kernel that decides."""
    from fastguard.kernels import decide

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
        (0, 128, math.inf, False, "ZERO", True),
        (1, 32, 2.0, False, None, True),
        (4, 128, 3.0, False, "ZERO", True),
        (1, 128, 2.0, True, None, True),
        (1, 1024, 2.0, False, "ZERO", True),
    ):
        constants = {
            "P": p,
            "INF_NORM": p == math.inf,
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


def record_variants() -> Variants:
    """Yields the variants of the kernel that writes a record."""
    from fastguard.kernels import record

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


def unit_variants() -> Variants:
    """Yields the variants of the kernels that clip units."""
    from fastguard.kernels import units

    rows = {"tensors_ptr": "*i64", "coefs_ptr": "*fp64", "n_units": "i32", "n_tensors": "i32"}
    of_units = {
        "tensors_ptr": "*i64",
        "limits_ptr": "*fp64",
        "coefs_ptr": "*fp64",
        "inv_scale_ptr": "*fp64",
        "n_units": "i32",
    }
    for dtype, item in ITEM_SIZE.items():
        powers = {"bf16": (2.0, math.inf), "fp32": (2.0, 3.0)}.get(dtype, (2.0,))
        for p in powers:
            propagates = p == 2.0
            both = (_torch_dtype(dtype),) * 2
            constants = units.coefs_constants(both, p, propagates, None)
            yield f"unit coefs {dtype} p={p:g}", units.coefs_launcher(p), of_units, constants
        shape = {"DTYPE": TYPES[dtype], "ITEM_SIZE": item, "BLOCK_BYTES": units.PLAIN.block_bytes}
        yield f"scale units {dtype}", units._scale, rows, shape


def watch_variants() -> Variants:
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


def update_variants() -> Variants:
    """Yields the variants of the update kernel."""
    from fastguard.kernels import formulas, update_launch

    pointers = {**UPDATED, "limits_ptr": "*fp64", "clipped_ptr": "*fp64", "partials_ptr": "*fp64"}
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


def update_end_variants() -> Variants:
    """Yields the variants of the kernels around an update: `advance`, clipping, statistics."""
    from fastguard.kernels import formulas, update_clipping, update_launch, update_statistics

    steps = {"tensors_ptr": "*i64", "addresses_ptr": "*i64", "hyper_ptr": "*fp64"}
    steps |= {"found_inf_ptr": "*fp32", "coefficients_ptr": "*fp64", "n_tensors": "i32"}
    for algorithm, number in formulas.ALGORITHMS.items():
        stochastic = algorithm == "adamw"
        constants = {"ALGORITHM": number, "HAS_STEPS": True, "STOCHASTIC": stochastic}
        constants |= {"SPIKES": stochastic, "CLIPS": stochastic}
        constants["SIZE"] = formulas.ADVANCE_SIZE
        yield f"advance {algorithm}", formulas._advance, steps, constants
    summed = {**UPDATED, "sums_ptr": "*i64", "n_chunks": "i32"}
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
