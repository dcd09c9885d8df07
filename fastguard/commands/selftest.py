"""Compares the backend of each device on this machine with the reference.

On each device it measures gradients of many dtypes and sizes, with and without NaN and Inf; makes
decisions; scales and cleans gradients; reads their bits and exponents; and checks that a guarded
optimizer skips a bad step and clips a good one as torch does. The command takes a few seconds. The
exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from fastguard.commands.environment import devices
from fastguard.commands.terminal import incidents_unlogged, print_table, say
from fastguard.errors.plain_text import printable
from fastguard.gradients.buckets import GradBuckets, bucketize
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.records.strict_json import dumps
from fastguard.stages import backend, reference
from fastguard.stages.contract import GuardState, Policy, Signals, Verdict
from fastguard.stages.decide import decide
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure
from fastguard.stages.spike_rules import SpikeRule, Threshold
from fastguard.stages.watch import WORD, count_exponents, read_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NORMS = (2.0, 1.0, 3.5, math.inf)
SIZES = (1, 7, 1024, 4099, 65536, 65537, 300_001)  # around the sizes of vectors, blocks and chunks
NAN, INF = math.nan, math.inf

NORM_RTOL = 1e-7
"""The documented relative tolerance of the norm of 16- and 32-bit gradients."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of comparing one stage on one device.

    Attributes:
        device: The device.
        stages: The backend: `"triton"`, `"cpu"` or `"reference"`.
        what: The stage.
        cases: Number of comparisons.
        problem: The first difference, or None.
    """

    device: str
    stages: str
    what: str
    cases: int
    problem: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard selftest`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Checks every device."""
    start = time.perf_counter()
    with incidents_unlogged():
        checks = [check for device in devices() for check in check_device(device)]
    seconds = time.perf_counter() - start
    notes = [note for device in devices() if (note := _without_kernels(device)) is not None]
    if [device.type for device in devices()] == ["cpu"]:
        notes = ["no GPU found: checked the CPU stages only, not the Triton kernels"]
    bad = [check for check in checks if check.problem is not None]
    if args.json:
        result = {
            "ok": not bad,
            "seconds": seconds,
            "notes": notes,
            "checks": list(map(asdict, checks)),
        }
        print(dumps(result, indent=2))
        return 1 if bad else 0
    print_table(
        ["device", "stages", "check", "cases", "result"],
        [
            [c.device, c.stages, c.what, str(c.cases), "ok" if c.problem is None else "FAILED"]
            for c in checks
        ],
    )
    for check in bad:
        say(f"FAILED {check.what} on {check.device}: {check.problem}")
    for note in notes:
        say(f"note: {note}")
    n = sum(check.cases for check in checks)
    verdict = (
        f"{len(bad)} of {len(checks)} checks failed" if bad else f"all {n:,} comparisons agree"
    )
    say(f"{verdict} ({seconds:.1f} s)")
    return 1 if bad else 0


def _without_kernels(device: torch.device) -> str | None:
    if device.type == "cpu" or backend.backend_of(device) == "triton":
        return None
    why = backend.why_not_triton(device)
    return f"no kernel ran on {device}, which uses the reference: {why}"


def check_device(device: torch.device) -> Iterator[Check]:
    """Runs all checks on one device; an exception counts as a failed check."""
    without_kernels = "cpu" if device.type == "cpu" else "reference"
    stages = "triton" if backend.backend_of(device) == "triton" else without_kernels
    for what, differences in CHECKS.items():
        cases, problem = 0, None
        try:
            for difference in differences(device):
                cases += 1
                problem = problem or difference
        except Exception as error:  # some kernels cannot be compiled or launched
            problem = f"{type(error).__name__}: {error}"
        text = None if problem is None else printable(" ".join(problem.split()), 400)
        yield Check(str(device), stages, what, cases, text)


def gradients(device: torch.device, dtype: torch.dtype, *, bad: bool) -> list[Tensor]:
    """Creates one gradient per size in `SIZES`, with the same values in every call.

    With `bad`, some of the gradients contain NaN or Inf.
    """
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator).to(dtype) for n in SIZES]
    if bad:
        grads[1][3], grads[3][-1], grads[5][-1], grads[6][1000:1003] = NAN, INF, -INF, NAN
    return [grad.to(device) for grad in grads]


def _buckets(grads: list[Tensor]) -> GradBuckets:
    return bucketize(grads, segments=[i % 2 for i in range(len(grads))], n_segments=2)


def _reference_stats(buckets: GradBuckets, norm_type: float) -> GradStats:
    """Measures with the reference."""
    (bucket,) = buckets.buckets
    summary, counts = reference.measure_bucket(
        bucket, buckets.n_measured, buckets.n_tensors, norm_type
    )
    return replace(measure(buckets, norm_type), summary=summary, counts=counts)


def _measures(device: torch.device) -> Iterator[str | None]:
    for dtype in DTYPES:
        for bad in (False, True):
            for norm_type in NORMS:
                buckets = _buckets(gradients(device, dtype, bad=bad))
                ours, expected = measure(buckets, norm_type), _reference_stats(buckets, norm_type)
                what = f"{dtype}, norm_type={norm_type:g}{', with NaN and Inf' if bad else ''}"
                rtol = 1e-12 if dtype is torch.float64 else NORM_RTOL
                yield _differs(what, ours.segment_norms, expected.segment_norms, rtol)
                yield _differs(f"counts of {what}", ours.counts, expected.counts, 0.0)


def _decisions(device: torch.device) -> Iterator[str | None]:
    limits = torch.tensor([0.5, INF], dtype=torch.float64, device=device)
    rules = (SpikeRule(window=4, warmup=2), Threshold(max=3.0))
    for nonfinite in ("skip", "zero", "propagate"):
        policy = Policy(limits, nonfinite, rules, ("grad_norm", "loss"))
        ours, expected = GuardState.fresh(policy, device), GuardState.fresh(policy, device)
        for step, loss in enumerate((1.0, 2.0, 1.5, NAN, 7.0, 1.0, 2.0, 1.0)):
            stats = measure(_buckets(gradients(device, torch.float32, bad=step == 6)))
            losses = torch.tensor([loss], dtype=torch.float64, device=device)
            signals = Signals(losses, ("loss",))
            one = decide(stats, signals, ours, policy)
            other = reference.decide(stats, signals, expected, policy)
            for field in Verdict.__slots__:
                what = f"{field} of step {step + 1}, nonfinite={nonfinite!r}"
                yield _differs(what, getattr(one, field), getattr(other, field), 1e-12)
        for field in ("counters", "windows", "rings"):
            yield _differs(field, getattr(ours, field), getattr(expected, field), 1e-12)


def _changes(device: torch.device) -> Iterator[str | None]:
    for dtype in DTYPES:
        for clean in (0.0, 1.0):
            ours = _buckets(gradients(device, dtype, bad=True))
            expected = _buckets(gradients(device, dtype, bad=True))
            multiplier = torch.tensor([0.3, 1.0], dtype=torch.float64, device=device)
            flag = torch.tensor(clean, device=device)
            (one,), (other,) = ours.buckets, expected.buckets
            # measures as a step does
            backend.stages(device).measure_bucket(one, 2, len(SIZES), 2.0)
            backend.stages(device).apply(one, multiplier, flag)
            reference.apply(other, multiplier, flag)
            rtol = 2 * torch.finfo(dtype).eps  # both the factor and the product are rounded once
            for size, a, b in zip(SIZES, one.grads, other.grads, strict=True):
                yield _differs(f"{size} elements of {dtype}, clean={clean:g}", a, b, rtol)


def _watched(device: torch.device) -> Iterator[str | None]:
    inv_scale = torch.tensor(2.0**-20 / 3, dtype=torch.float64, device=device)
    for dtype in DTYPES:
        buckets = _buckets(gradients(device, dtype, bad=True))
        buckets.buckets[0].grads[4][::3] = 0.0
        (bucket,), n = buckets.buckets, buckets.n_measured
        expected = reference.read_bits(bucket, n, True, True)
        nonzero, checksum = read_bits(buckets, nonzero=True, checksum=True)
        yield _differs(f"nonzero elements of {dtype}", nonzero, expected[:n], 0.0)
        yield _differs(f"checksum of {dtype}", checksum, expected[n] & WORD, 0.0)
        counts = count_exponents(buckets, 7, inv_scale)
        expected = reference.count_exponents(bucket, 7, inv_scale)
        yield _differs(f"exponents of {dtype}", counts, expected, 0.0)


def _steps(device: torch.device) -> Iterator[str | None]:
    fused = device.type in ("cpu", "cuda")
    weights = [torch.nn.Parameter(g) for g in gradients(device, torch.float32, bad=False)]
    twins = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    opt = GuardedOptimizer(torch.optim.AdamW(weights, lr=0.1, fused=fused), max_norm=1.0)
    plain = torch.optim.AdamW(twins, lr=0.1, fused=fused)
    for weight, twin in zip(weights, twins, strict=True):
        weight.grad = torch.full_like(weight, 2.0)
        twin.grad = weight.grad.clone()
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    opt.step()
    plain.step()
    for weight, twin in zip(weights, twins, strict=True):
        what = "a clipped step of AdamW"
        yield _differs(what, weight.detach(), twin.detach(), 1e-5, atol=1e-7)
    before = [w.detach().clone() for w in weights]
    for weight in weights:
        weight.grad = torch.full_like(weight, NAN)
    opt.step()
    for weight, was in zip(weights, before, strict=True):
        same = torch.equal(weight.detach(), was)
        yield None if same else "a step with NaN gradients changed the weights"
    yield None if opt.skipped_steps == 1 else f"{opt.skipped_steps} steps were skipped, not 1"


def _differs(
    what: str, ours: Tensor, expected: Tensor, rtol: float, atol: float = 0.0
) -> str | None:
    """Describes how two tensors differ beyond rounding, or None if they agree."""
    try:
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        return f"{what}: {error}"
    return None


CHECKS: dict[str, Callable[[torch.device], Iterator[str | None]]] = {
    "measure": _measures,
    "decide": _decisions,
    "apply": _changes,
    "watch": _watched,
    "optimizer": _steps,
}
